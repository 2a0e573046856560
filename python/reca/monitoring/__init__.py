"""Metrics, logs, progress, warnings and evaluations of a run."""
