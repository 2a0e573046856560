"""Run RECA steps in a hand-written loop: what `reca.train` does in every step, without files, logs and checkpoints.

    python examples/reconstruct.py [RECIPE]

The default recipe is a tiny random Show-o on images of the toy dataset, which trains on a CPU in seconds.
"""

import sys

import torch

import reca
from reca.config.recipe_files import load_recipe
from reca.data.batch import task_rng
from reca.data.loader import open_loader
from reca.optim import freeze


def main(name: str = "show_o_tiny", steps: int = 10) -> list[float]:
    """Train and return the loss of every step."""
    recipe = load_recipe(name)
    model = reca.load(name)
    roles = freeze(model, recipe.train.roles, recipe.train.frozen)
    print(f"training {', '.join(roles)}; the encoders that compute h_v stay frozen")

    # Unlabeled images as the model's views of them, and template sentences.
    batches = iter(open_loader(recipe.data, "reca", model.views("reca"), seed=0, micro_batch=16, prepare=model.prepare))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(steps):
        batch, rng = next(batches), task_rng(0, "reca")  # every draw is a function of (seed, sample)
        prepared = model.ensure_prepared(batch, rng)  # layout, labels, masks, weight: computed in the loader's threads
        features = model.encode(batch)  # h_v and the target, from frozen encoders without gradient
        term = model.loss(prepared, features, rng)  # the model's native loss for generating the same image
        loss = term.sum / term.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
