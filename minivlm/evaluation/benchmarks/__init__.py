"""Readers of public benchmarks in their own file formats: rows -> questions of the evaluation job."""
