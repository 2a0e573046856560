"""What a checkpoint holds of a model and its optimizer."""

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions

from reca.models.base import Adapter

EMA = "ema"  # the folder of the averages
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def changed_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that are not as published, by name: trained by this run or by one before it.

    The tensors themselves, so that loading fills them.
    """
    return {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad or name in adapter.inherited}


def size(adapter: Adapter, ema: bool = False) -> int:
    """Count the bytes of a checkpoint: the changed parameters, and AdamW's two moments of each that is trained.

    ema: with an fp32 average of these, too.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    stored = [*changed_parameters(adapter).values(), *trained, *trained]
    return 4 * sum(p.numel() for p in trained if ema) + sum(p.numel() * p.element_size() for p in stored)


def tensors(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a flat optimizer state. All else are settings, which come from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
