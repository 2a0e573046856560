"""Toy datasets: small images with captions, test prompts and a judge, for models that a CPU trains in minutes.

dataset.py   what a toy dataset is, and its name on the command line
scene.py     the content of an image: one thing, or two with a relation
captions.py  texts: captions, phrases around them, questions, templates
split.py     a split: images as functions of (seed, name, index)
source.py    a split as a data source of recipes
shapes/      coloured shapes, and the variant `jitter`
emoji/       OpenMoji artwork, and variants with other images or captions
"""
