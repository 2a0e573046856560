"""The questions a UMM answers. Everything else in the driver speaks to this interface only."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from reca.data.batch import Batch
from reca.data.views import Views
from reca.models.common import deferred_weights, likelihood
from reca.models.common.inference import check_pairs
from reca.rng import CounterRNG
from reca.sampling_options import check_limits
from reca_kernels.host import on_device

P = TypeVar("P", bound="Prepared")

ROLES = (
    "und_encoder",  # vision tower that only understanding uses
    "shared_encoder",  # vision encoder that understanding and generation share
    "und_lm",  # understanding expert of a decoupled language model
    "gen_lm",  # generation expert of a decoupled language model
    "shared_lm",  # language model that serves both
    "gen_head",  # diffusion head, DiT, latent projections
    "bridge",  # projectors, connectors, queries between the parts
    "codec",  # image tokenizer or VAE
    "embed",  # token embeddings and output head
)


@dataclass(frozen=True)
class Prepared:
    """Hold what a loss needs of its batch beside features. `Adapter.prepare` makes it on the host, before the step.

    A model's own has its layout, labels and masks, too.

    task       whose loss it is
    seed       of the random numbers that it was made with
    weight     what the loss is to be divided by, such as the number of predicted tokens
    by_sample  the loss is wanted by sample, too (LossTerm.samples); `asked_by_sample` sets it
    """

    task: str
    seed: int
    weight: float
    by_sample: bool = field(default=False, init=False)
    packed: ClassVar[bool] = False  # samples stand behind each other; False: all are padded to the longest

    @property
    def tokens(self) -> Sequence[int]:
        """Count the rows of each sample's sequence in the language model, without padding."""
        raise NotImplementedError

    def asked_by_sample(self: P) -> P:
        """Return the same with the loss wanted by sample."""
        asked = copy.copy(self)
        object.__setattr__(asked, "by_sample", True)
        return asked

    def to(self: P, device: torch.device | str) -> P:
        """Copy the tensors to `device` without synchronising with a GPU."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self) if f.init})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return on_device(value, device)
    if hasattr(value, "to"):
        return value.to(device)
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


class LossTerm(NamedTuple):
    """Hold a loss as a sum and the weight it is to be divided by, so that means can be taken over a whole update."""

    sum: Tensor  # fp32 [], carries the graph
    weight: Tensor  # fp32 [], no gradient
    samples: Tensor | None = None  # fp32 [B, 2], sum and weight of each sample, no gradient; where it was asked for

    @classmethod
    def of(cls, total: Tensor, prepared: Prepared, samples: Tensor | None = None) -> "LossTerm":
        """Give a sum the weight that was counted on the host."""
        return cls(total, torch.full_like(total.detach(), prepared.weight), samples)


def in_fp32(function: Callable) -> Callable:
    """Make new tensors fp32 inside a function, whatever torch.get_default_dtype() is around it."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return wrapped


def _checked(method: Callable) -> Callable:
    """Check what generate, edit, answer or reconstruct is asked before it is called. Of no samples it makes nothing."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments | options
        lists = {
            name: given[name] for name in ("prompts", "images", "instructions", "questions", "seeds") if name in given
        }
        if isinstance(batch := given.get("batch"), Batch):  # to reconstruct; in others it is a number
            lists["images"] = batch.text
        check_pairs(**lists)
        check_limits(given)
        return method(*args, **options) if all(map(len, lists.values())) else []

    return call


class Adapter(nn.Module):
    """Adapt one UMM to the driver. Data flows image -> views -> encode -> prompt -> model -> loss."""

    name: ClassVar[str]
    tasks: ClassVar[frozenset[str]]  # which of TASKS it can train on
    abilities: ClassVar[frozenset[str]]  # which of generate, reconstruct, edit, answer it has
    trainable_roles: ClassVar[frozenset[str]]  # what RECA trains by default (paper, section 3)
    encoder_roles: ClassVar[frozenset[str] | None] = None  # whose parameters `encode` reads; None: any
    understanding_roles: ClassVar[frozenset[str]] = frozenset(
        {"und_encoder", "shared_encoder", "und_lm", "shared_lm", "embed", "bridge"}
    )  # roles with a part in answers; if training changes none of them, answers stay bit-identical
    condition_keys: ClassVar[tuple[str, ...]]  # features that h_v is made of, each a list or first dim of samples
    tokenizer: Any = None  # that of transformers, in models that have one
    reduces_every_micro_batch: bool = False  # gradients are added up over ranks after every micro-batch
    has_whole_replicas: bool = False  # FSDP2 has given every rank all parameters
    inherited: frozenset[str] = frozenset()  # parameters that runs before this one have changed (train.init_from)
    state: Any = None  # the counters of the checkpoint that its weights are of; None: of none
    lora: Any = None  # the LoraConfig of what it has of LoRA (lora.py); None: nothing

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("generate", "reconstruct", "edit", "answer"):
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name]))

    @classmethod
    def load(cls, config: Any, device: torch.device | str = "cpu") -> "Adapter":
        """Build from published files (hub id or folder in `config.weights`) or, with no weights, at random.

        Missing or unexpected keys raise ValueError with the list. Made with `init_random`, or `init_on_meta` and
        `assign_state_dict` (models/common/weight_files.py), weights can go straight into the shards of several ranks.
        """
        raise NotImplementedError

    @classmethod
    def build_meta(cls, config: Any) -> "Adapter":
        """Build what `load` builds without any file: sizes, types and roles are those of the recipe, weights are not.

        A tokenizer that would have to be downloaded is replaced by one that has no words but as many tokens, where
        their number counts. `reca check` calls it under FakeTensorMode, so that it takes no memory.
        """
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the model. Weights that are still to come (deferred_weights) are only cast."""
        if deferred_weights.is_deferring():
            _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            return self if dtype is None else super().to(dtype)
        return super().to(*args, **kwargs)

    def sequence(self) -> dict[str, int]:
        """Count the rows of one RECA sequence by what they stand for, without text; images are of the largest size."""
        raise NotImplementedError

    def views(self, task: str) -> Views:
        """Say which pixels a task needs."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> dict[str, Any]:
        """Run the frozen parts on the pixels. No gradient; features depend on the sample alone and can be cached."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle is made of.

        On a model's first pass transformers hangs hooks into it that are local functions, which nothing can pickle.
        They are taken off, as it hangs them anew when it needs them.
        """
        for module in self.modules():
            module.__dict__.pop("_output_capturing_hooks_installed", None)
            for number, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[number]
        return self.__dict__

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        """Lay out a batch's sequences, draw its masks and count its labels, all on the host.

        The loader's threads call it, so it must not touch parameters. Draws are the same on every device.
        """
        raise NotImplementedError

    def ensure_prepared(self, batch: Batch, rng: CounterRNG) -> Prepared:
        """Return what the loader has prepared with these random numbers, or prepare it now, on the batch's device."""
        if batch.prepared is not None and batch.prepared.seed == rng.seed:
            return batch.prepared
        return self.prepare(batch, rng).to(batch.sample_ids.device)

    def loss(self, prepared: Any, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        """Compute the native loss of the task from the model's own Prepared. It waits for no GPU."""
        raise NotImplementedError

    def forward(self, batch: Batch, rng: CounterRNG, condition: str = "own") -> LossTerm:
        """Compute the loss from pixels. condition="other" gives every sample the next one's h_v, as a control.

        The last gets that of `batch.neighbour`, or of the first sample where there is no neighbour.
        """
        features = self._features(batch)
        if condition == "other":
            after = features if batch.neighbour is None else self._features(batch.neighbour)
            if batch.neighbour is None and len(batch) < 2:
                raise ValueError(
                    "condition 'other' takes h_v from another sample: it needs two samples, or a batch with neighbour"
                )
            features = features | {key: _shifted(features[key], after[key]) for key in self.condition_keys}
        return self.loss(self.ensure_prepared(batch, rng), features, rng)

    def _features(self, batch: Batch) -> dict[str, Any]:
        """Take features from the cache, or encode and put them there."""
        if batch.features is not None:
            return batch.features
        features = self.encode(batch)
        if batch.on_encoded:
            batch.on_encoded(features)
        return features

    def config_warnings(self) -> list[str]:
        """Say what in this configuration is known to make RECA collapse."""
        return []

    def generate(self, prompts: list[str], seeds: list[int], *_: Any, **sampling: Any) -> list[Tensor]:
        """Generate an image per prompt, uint8 [3, H, W]. It depends on (prompt, seed), not on the batch."""
        raise NotImplementedError(f"{self.name} cannot generate images")

    def reconstruct(self, batch: Batch, seeds: list[int], *_: Any, **sampling: Any) -> list[Tensor]:
        """Draw the images of a reca batch again from their h_v and templates, uint8 [3, H, W]; without guidance.

        That is what the RECA loss trains. No text is dropped.
        """
        raise NotImplementedError(f"{self.name} cannot reconstruct images")

    def edit(
        self, images: list[Tensor], instructions: list[str], seeds: list[int], *_: Any, **sampling: Any
    ) -> list[Tensor]:
        """Change images by instructions, all uint8 [3, H, W]."""
        raise NotImplementedError(f"{self.name} cannot edit images; it can {' and '.join(sorted(self.abilities))}")

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        """Answer questions about images by greedy decoding."""
        raise NotImplementedError(f"{self.name} cannot answer questions about images")

    def log_likelihood(
        self, images: list[Tensor], questions: list[str], answers: list[str]
    ) -> list[likelihood.LogLikelihood]:
        """Compute log p(answer | image, question) of each, with the number of tokens it is a sum over.

        An answer that is longer than training would read is cut as there.
        """
        if "i2t" not in self.tasks:
            raise NotImplementedError(f"{self.name} has no likelihood of answers about images")
        return likelihood.log_likelihood(self, images, questions, answers)

    def inference_autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes outside of training."""
        return contextlib.nullcontext()

    def export(self, folder: Path) -> list[str]:
        """Write the files, with the names and keys, that the public inference code reads. Returns their names.

        All of them are written or none (exporting.py). Raises OSError when the disk does not take them.
        """
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """Map every parameter name to its role, one of ROLES."""
        raise NotImplementedError

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Say whether the released trainer applies weight decay to this parameter."""
        return parameter.ndim >= 2

    def blocks(self) -> list[nn.Module]:
        """List the repeated trainable layers: units of FSDP2 sharding and activation checkpointing."""
        raise NotImplementedError

    def repeats_blocks(self) -> bool:
        """Tell whether a loss multiplies by a trained weight of `blocks` more than once, as by each of two images."""
        return False

    def encoders(self) -> list[nn.Module]:
        """List the modules that make most of `encode`: a tower's layers, a codec's convolutions. Units of compilation.

        None need be listed. Their forward pass takes and gives tensors whose types do not depend on the images.
        """
        return []


def _shifted(feature: Tensor | list, after: Tensor | list) -> Tensor | list:
    """Drop the first sample's feature and append the first of `after`; a list where they differ in shape."""
    rows = [*list(feature)[1:], after[0]]
    same = len({row.shape for row in rows}) == 1
    return torch.stack(rows) if isinstance(feature, Tensor) and same else rows
