"""The interface between a UMM and the driver: `Adapter`, `Prepared` and `LossTerm`."""

import contextlib
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
from reca.models.common.inference import check_pairs, eval_mode
from reca.options.sampling import check_option
from reca.rng import CounterRNG
from reca_kernels.host import on_device

P = TypeVar("P", bound="Prepared")

ROLES = (
    "und_encoder",  # vision encoder used by understanding only
    "shared_encoder",  # vision encoder shared by understanding and generation
    "und_lm",  # understanding expert of a decoupled language model
    "gen_lm",  # generation expert of a decoupled language model
    "shared_lm",  # language model shared by understanding and generation
    "gen_head",  # diffusion head, DiT, latent projections
    "bridge",  # projectors, connectors and learned queries between the components
    "codec",  # image tokenizer or VAE
    "embed",  # token embeddings and output head
)
ABILITIES = ("generate", "reconstruct", "edit", "answer")  # methods of an Adapter that a model need not have


@dataclass(frozen=True)
class Prepared:
    """Inputs of a loss other than features, computed on the host by `Adapter.prepare` before the step.

    Each model subclasses it with its layout, labels and masks.

    task       name of the task
    seed       seed of the random numbers used to prepare it
    weight     divisor of the loss, such as the number of predicted tokens
    by_sample  whether per-sample losses are also computed (LossTerm.samples); set by `asked_by_sample`
    """

    task: str
    seed: int
    weight: float
    by_sample: bool = field(default=False, kw_only=True)
    packed: ClassVar[bool] = False  # samples are concatenated; False: padded to the longest

    @property
    def tokens(self) -> Sequence[int]:
        """Return the length of each sample's sequence in the language model, without padding."""
        raise NotImplementedError(f"{type(self).__module__}.Prepared has no `tokens`, which max_tokens needs")

    @property
    def labels(self) -> Tensor:
        """Return the target tokens of replies in order, IGNORE_INDEX elsewhere."""
        raise NotImplementedError(f"{type(self).__module__}.Prepared has no `labels`, which log_likelihood needs")

    def asked_by_sample(self: P) -> P:
        """Return a copy whose loss is also computed per sample."""
        return replace(self, by_sample=True)

    def to(self: P, device: torch.device | str) -> P:
        """Copy the tensors to `device` without synchronising with a GPU."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return on_device(value, device)
    if hasattr(value, "to"):
        return value.to(device)
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


class LossTerm(NamedTuple):
    """A loss as a sum and its divisor, so that the mean can be taken over a whole update."""

    sum: Tensor  # fp32 [], with gradient
    weight: Tensor  # fp32 [], no gradient
    samples: Tensor | None = None  # fp32 [B, 2], sum and weight of each sample, no gradient; only if requested

    @classmethod
    def of(cls, total: Tensor, prepared: Prepared, samples: Tensor | None = None) -> "LossTerm":
        """Combine a sum with the weight that `prepare` computed on the host."""
        return cls(total, torch.full_like(total.detach(), prepared.weight), samples)


def _checked(method: Callable) -> Callable:
    """Validate the arguments of generate, edit, answer or reconstruct, and run it in eval mode.

    Return [] for empty input without a call.
    """
    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())[1:]  # without the model
    shown = ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{method.__name__}: {error}; its parameters are {shown}") from None
        given = bound.arguments
        lists = {
            name: given[name] for name in ("prompts", "images", "instructions", "questions", "seeds") if name in given
        }
        if method.__name__ == "reconstruct":
            if not isinstance(batch := given.get("batch"), Batch):
                raise TypeError(
                    f"reconstruct: expected a reca.data.batch.Batch, got {type(batch).__name__}; "
                    "reca.monitoring.reconstructions.image_batch(RECIPE, MODEL, COUNT) reads one from data.images"
                )
            if batch.task != "reca":
                raise ValueError(
                    f"reconstruct: expected a batch of the task reca, got {batch.task}; pass images with templates"
                )
            lists["images"] = batch.text
        check_pairs(**lists)
        if "seeds" in lists:
            given["seeds"] = [int(seed) for seed in lists["seeds"]]
        for parameter in signature.parameters.values():
            if parameter.default is not parameter.empty and parameter.name in given:
                given[parameter.name] = check_option(parameter, given[parameter.name])
        if not all(map(len, lists.values())):
            return []
        with eval_mode(args[0]):
            return method(*bound.args, **bound.kwargs)

    return call


class Adapter(nn.Module):
    """The driver's interface to one UMM. Data flow: image -> views -> encode -> prompt -> model -> loss."""

    name: ClassVar[str]
    tasks: ClassVar[frozenset[str]]  # supported training tasks, a subset of TASKS
    abilities: ClassVar[frozenset[str]]  # those of ABILITIES that the class defines
    trainable_roles: ClassVar[frozenset[str]]  # roles that RECA trains by default (paper, section 3)
    encoder_roles: ClassVar[frozenset[str] | None] = None  # roles whose parameters `encode` reads; None: any
    understanding_roles: ClassVar[frozenset[str]] = frozenset(
        {"und_encoder", "shared_encoder", "und_lm", "shared_lm", "embed", "bridge"}
    )  # roles that answers depend on; if training changes none of them, answers stay bit-identical
    condition_keys: ClassVar[tuple[str, ...]]  # keys of the features that h_v is computed from; first dim: samples
    tokenizer: Any = None  # transformers tokenizer, if the model has one
    reduces_every_micro_batch: bool = False  # gradients are reduced over ranks after every micro-batch
    has_whole_replicas: bool = False  # FSDP2 keeps all parameters on every rank
    inherited: frozenset[str] = frozenset()  # parameters that earlier runs have changed (train.init_from)
    state: Any = None  # counters of the checkpoint that the weights were loaded from; None: no checkpoint
    lora: Any = None  # LoraConfig of its LoRA layers (reca/training/lora.py); None: no LoRA

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ABILITIES:
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name]))
        cls.abilities = frozenset(name for name in ABILITIES if getattr(cls, name) is not getattr(Adapter, name))

    @classmethod
    def load(cls, config: Any, device: torch.device | str = "cpu") -> "Adapter":
        """Build the model from published files; `config.weights` is a hub id or folder, or None for random weights.

        Raises ValueError that lists missing and unexpected keys. Use `init_random`, or `init_on_meta` and
        `assign_state_dict` (models/common/weight_files.py): with these, each rank can load only its own shards.
        """
        raise NotImplementedError

    @classmethod
    def load_tokenizer(cls, config: Any, local: bool = False) -> Any:
        """Load the tokenizer that `load` uses, and download no weights; None: the model has none.

        local: download nothing. Raises ValueError if the tokenizer is missing or does not fit the model.
        """
        return None

    @classmethod
    def build_meta(cls, config: Any, tokenizer: Any = None) -> "Adapter":
        """Build the model without reading files: shapes, dtypes and roles follow the recipe, weights are not loaded.

        tokenizer: that of `load_tokenizer`; None: one without words, and of as many tokens where their number matters.
        `reca check` calls this under FakeTensorMode, so it allocates no memory.
        """
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the model. While weights are deferred (deferred_weights), only cast it."""
        if deferred_weights.is_deferring():
            _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            return self if dtype is None else super().to(dtype)
        return super().to(*args, **kwargs)

    def sequence(self) -> dict[str, int]:
        """Return the token counts of one RECA sequence by kind, without text, for images of the largest size."""
        raise NotImplementedError

    def views(self, task: str) -> Views:
        """Return the image views that a task needs."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> dict[str, Any]:
        """Run the frozen encoders on the pixels, without a gradient.

        Each sample's features depend on that sample alone, so they can be cached.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copying and pickling.

        On a model's first forward pass transformers registers hooks that are local functions and cannot be pickled.
        They are removed here; transformers registers them again when it needs them.
        """
        for module in self.modules():
            module.__dict__.pop("_output_capturing_hooks_installed", None)
            for number, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[number]
        return self.__dict__

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        """Lay out a batch's sequences, draw its masks and count its labels, all on the host.

        The loader's threads call it, so it must not access parameters. The draws are the same for every device.
        """
        raise NotImplementedError

    def ensure_prepared(self, batch: Batch, rng: CounterRNG) -> Prepared:
        """Return the loader's result if it used the same seed; otherwise prepare now and move to the batch's device."""
        if batch.prepared is not None and batch.prepared.seed == rng.seed:
            return batch.prepared
        return self.prepare(batch, rng).to(batch.sample_ids.device)

    def loss(self, prepared: Any, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        """Compute the native loss of the task from this model's Prepared, without synchronising with a GPU."""
        raise NotImplementedError

    def forward(self, batch: Batch, rng: CounterRNG, condition: str = "own") -> LossTerm:
        """Compute the loss from pixels.

        condition="other", a control, replaces the h_v of every sample by that of the next one. The last sample gets the
        h_v of `batch.neighbour`, or that of the first sample if there is no neighbour.
        Raises TypeError if `loss` returns anything but a LossTerm of scalar tensors.
        """
        features = self._features(batch)
        if condition == "other":
            after = features if batch.neighbour is None else self._features(batch.neighbour)
            if batch.neighbour is None and len(batch) < 2:
                raise ValueError(
                    "condition 'other' takes h_v from another sample: pass at least two samples or set batch.neighbour"
                )
            features = features | {key: _shifted(features[key], after[key]) for key in self.condition_keys}
        term = self.loss(self.ensure_prepared(batch, rng), features, rng)
        if not isinstance(term, LossTerm) or not all(isinstance(part, Tensor) and not part.ndim for part in term[:2]):
            raise TypeError(
                f"{type(self).__module__}.{type(self).__name__}.loss returned {_shown(term)}: expected a LossTerm of "
                "two scalar tensors, the sum of the losses and their weight; LossTerm.of(sum, prepared) makes one"
            )
        return term

    def _features(self, batch: Batch) -> dict[str, Any]:
        """Return cached features, or encode the batch and cache the result."""
        if batch.features is not None:
            return batch.features
        features = self.encode(batch)
        if batch.on_encoded:
            batch.on_encoded(features)
        return features

    def config_warnings(self) -> list[str]:
        """Return warnings about settings with which RECA is known to fail."""
        return []

    def check_templates(self, templates: Sequence[str]) -> None:
        """Raise ValueError for a template that is too long, as `prepare` and `reconstruct` do."""

    def generate(self, prompts: list[str], seeds: list[int], *_: Any, **sampling: Any) -> list[Tensor]:
        """Generate an image per prompt, uint8 [3, H, W]. Each depends on its (prompt, seed) only, not on the batch."""
        raise NotImplementedError(f"{self.name} cannot generate images")

    def reconstruct(self, batch: Batch, seeds: list[int], *_: Any, **sampling: Any) -> list[Tensor]:
        """Reconstruct the images of a reca batch from their h_v and templates, uint8 [3, H, W].

        This is the task that the RECA loss trains: no guidance is applied and no text is dropped.
        """
        raise NotImplementedError(f"{self.name} cannot reconstruct images")

    def edit(
        self, images: list[Tensor], instructions: list[str], seeds: list[int], *_: Any, **sampling: Any
    ) -> list[Tensor]:
        """Edit images by instructions. Inputs and results are uint8 [3, H, W]."""
        raise NotImplementedError(f"{self.name} cannot edit images; it can {' and '.join(sorted(self.abilities))}")

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        """Answer questions about images by greedy decoding."""
        raise NotImplementedError(f"{self.name} cannot answer questions about images")

    def log_likelihood(
        self, images: list[Tensor], questions: list[str], answers: list[str]
    ) -> list[likelihood.LogLikelihood]:
        """Compute log p(answer | image, question) of each triple, and the number of tokens it sums over.

        Answers longer than the training limit are truncated as in training, with a warning.
        """
        if "i2t" not in self.tasks:
            raise NotImplementedError(f"{self.name} cannot compute the likelihood of answers: it has no i2t task")
        return likelihood.log_likelihood(self, images, questions, answers)

    def inference_autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context for inference."""
        return contextlib.nullcontext()

    def export(self, folder: Path) -> list[str]:
        """Write the files that the public inference code reads, under its file names and keys, and return their names.

        Either all files are written or none (exporting.py). Raises OSError when they cannot be written.
        """
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """Map every parameter name to its role, one of ROLES."""
        raise NotImplementedError

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Tell whether the released trainer applies weight decay to this parameter."""
        return parameter.ndim >= 2

    def blocks(self) -> list[nn.Module]:
        """List the repeated trainable layers: units of FSDP2 sharding and activation checkpointing."""
        raise NotImplementedError

    def repeats_blocks(self) -> bool:
        """Tell whether a loss runs trained weights of `blocks` more than once per pass, such as once per image."""
        return False

    def encoders(self) -> list[nn.Module]:
        """List the modules that do most of the work of `encode`, such as encoder layers: units of torch.compile.

        The list may be empty. The dtypes of their inputs and outputs must not depend on the images.
        """
        return []


def _shown(value: Any) -> str:
    """Describe the type of a value, with the types of a tuple's items and the shapes of tensors."""
    name = type(value).__name__
    if isinstance(value, tuple):
        return f"{name}({', '.join(map(_shown, value))})"
    return f"{name}{list(value.shape)}" if isinstance(value, Tensor) else name


def _shifted(feature: Tensor | list, after: Tensor | list) -> Tensor | list:
    """Drop the first sample's feature and append the first of `after`. Return a list if the shapes differ."""
    rows = [*list(feature)[1:], after[0]]
    same = len({row.shape for row in rows}) == 1
    return torch.stack(rows) if isinstance(feature, Tensor) and same else rows
