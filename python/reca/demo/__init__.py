"""The demo: embedded worlds in which a CPU pre-trains and post-trains a tiny model within minutes."""
