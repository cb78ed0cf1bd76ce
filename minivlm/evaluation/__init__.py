"""Held-out questions: tasks, the evaluation job, the report."""
