"""The demo: toy datasets on which a CPU pre-trains and post-trains a tiny model within minutes."""
