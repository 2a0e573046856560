"""Runs: their folder, lock and status, their data, and what they start from."""
