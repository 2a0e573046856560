"""What a checkpoint holds of a model and its optimizer."""

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions

from reca.config import OptimConfig
from reca.models.base import Adapter
from reca.optim import state_bytes

EMA = "ema"  # the folder of the averages
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def changed_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that are not as published, by name: trained by this run or by one before it.

    The tensors themselves, so that loading fills them.
    """
    return {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad or name in adapter.inherited}


def size(adapter: Adapter, config: OptimConfig, ema: bool = False) -> int:
    """Count the bytes of a checkpoint: the changed parameters, and the optimizer's state of each that is trained.

    ema: with an fp32 average of these, too.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    changed = sum(p.numel() * p.element_size() for p in changed_parameters(adapter).values())
    return changed + sum(state_bytes(p, config) + (4 * p.numel() if ema else 0) for p in trained)


def tensors(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a flat optimizer state. All else are settings, which come from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
