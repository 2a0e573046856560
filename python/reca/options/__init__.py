"""Typed options: fields with bounds, conversion from and to text, options of samplers."""
