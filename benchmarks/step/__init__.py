"""Whole training steps of each model, ours and as formulated by the released trainers: time by part, and memory.

recipes.py   models and sizes, with random weights
release/     the losses as formulated by the released trainers, one module per model
parts.py     timing of the parts of a step
counting.py  operators, bytes, FLOPs and host synchronisations of a step
worker.py    a process for one form, which runs steps on request
rows.py      the columns of a measurement
report.py    the table, the plot and docs/step.md
targets.py   targets and predictions
"""
