"""Run a toy recipe under torchrun: launch_toy.py RECIPE [key=value ...]; rank 0 writes the final weights."""

import sys

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reca import distributed
from reca.config import load_recipe
from reca.train import Trainer
from tests.driver.toy import ToyAdapter

recipe = load_recipe(sys.argv[1], sys.argv[2:])
trainer = Trainer(recipe, ToyAdapter())
trainer.run()
state = get_model_state_dict(trainer.adapter, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if distributed.rank() == 0:
    torch.save(state, trainer.run_dir / "final.pt")
distributed.barrier()  # a rank that leaves early takes its threads from under the others
distributed.stop()
distributed.leave(0)
