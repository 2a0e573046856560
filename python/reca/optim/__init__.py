"""Selection of trained parameters, optimizers, learning rate schedules, and gradient norms."""

from reca.optim.build import apex_adam, check_apex, make_optimizer
from reca.optim.fused_backward import FusedBackward, check_passes
from reca.optim.gradients import gradient_norm
from reca.optim.moments import state_bytes
from reca.optim.schedule import lr_at, set_lr
from reca.optim.trained import freeze

__all__ = [
    "FusedBackward",
    "apex_adam",
    "check_apex",
    "check_passes",
    "freeze",
    "gradient_norm",
    "lr_at",
    "make_optimizer",
    "set_lr",
    "state_bytes",
]
