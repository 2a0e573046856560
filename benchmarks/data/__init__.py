"""Benchmark of image decoding and resizing, compared with common loaders: see __main__.py."""
