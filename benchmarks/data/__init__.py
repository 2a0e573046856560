"""Decoding and resizing, measured beside the usual loaders: see __main__.py."""
