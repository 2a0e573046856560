"""A whole training step of each model, ours and in the formulation of the released trainers: time by part and memory.

recipes.py   what is trained at which size, from random weights
release/     the same loss as the released trainers formulate it, one module per model
parts.py     the clock that the parts of a step stop
counting.py  operators, bytes, FLOPs and host waits of a step
worker.py    one form in a process of its own, which makes a step whenever it is told to
rows.py      what a measurement holds
report.py    the table, the plot and docs/step.md
targets.py   what is to be reached, and what was predicted
"""
