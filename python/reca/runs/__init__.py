"""The run folder: lineage, lock and status."""
