"""Thin command lines: `python -m jobs.NAME --help`."""
