"""Runs, curves and the model registry. MLflow is imported only here, and only the calling process writes to it."""
