"""Recipes: their keys, reading and writing."""
