"""FP8 matmuls in the linear layers of the transformer blocks, by torchao, on GPUs that support them.

Inputs, weights and output gradients are rounded to e4m3 (3 bits of mantissa), with one scale per row, for the forward
matmul and for the gradient of the input. The gradient of the weight is computed in bf16: AdamW accumulates it, and its
inner dimension, the tokens of a batch, need not be a multiple of 16. Weights and gradients are stored as without FP8.
"""

import importlib.util

import torch
from torch import nn

from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.training.lora import is_lora

MULTIPLE = 16  # the hardware requires multiples for both dimensions of a weight
CAPABILITY = (8, 9)


def check_usable(device: torch.device) -> None:
    """Raise RecipeError if `train.float8` cannot run: without torchao, or without a GPU that supports FP8 matmuls."""
    if importlib.util.find_spec("torchao") is None:
        raise RecipeError(
            "train.float8=true needs torchao, which is not installed: pip install 'reca[float8]', or set it to false"
        )
    found = "there is none"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        found = f"this one has {capability[0]}.{capability[1]}"
    raise RecipeError(
        f"train.float8=true needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer (Ada, Hopper, "
        f"Blackwell), and {found}: set it to false"
    )


def convert(adapter: Adapter, emulate: bool = False) -> int:
    """Convert the linear layers inside the blocks to FP8, and return their number.

    Layers with a size that is not a multiple of 16 are left unchanged, and so are LoRA's. emulate: round to FP8, but
    multiply without FP8 hardware. Raises RecipeError if no layer qualifies.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    object.__setattr__(config, "emulate", emulate)  # frozen, and the recipe has no argument for it
    converted = 0
    for block in adapter.blocks():
        names = {name for name, layer in block.named_modules() if _fits(layer) and not is_lora(f".{name}")}
        convert_to_float8_training(block, module_filter_fn=lambda _, name, names=names: name in names, config=config)
        for name in names:
            block.get_submodule(name).register_forward_pre_hook(_contiguous)
        converted += len(names)
    if not converted:
        raise RecipeError(
            f"train.float8=true finds no linear layer in the blocks of {adapter.name} whose sizes are multiples of "
            f"{MULTIPLE}: set it to false"
        )
    return converted


def _contiguous(layer: nn.Module, inputs: tuple) -> tuple:
    """Make the input of a layer contiguous, as torchao's row-wise scaling requires."""
    return inputs[0].contiguous(), *inputs[1:]


def _fits(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
