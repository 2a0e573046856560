"""Harmon's Adapter: one MAR encoder and one Qwen2 understand and generate; only the image codec is frozen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm
from reca.models.common.images import to_unit
from reca.models.common.inference import options_of
from reca.models.harmon import modules, prompt, sampling, weights
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.loss import Prepared, compute_loss, prepare
from reca.models.harmon.modules import Network
from reca.rng import CounterRNG


class Harmon(Network, Adapter):
    """Features of `encode`, fp32 [B, m, n, C]: latents, those of the target image; h_v, those of h_v's image."""

    name = "harmon"
    tasks = frozenset({"reca", "i2t", "t2i"})
    trainable_roles = frozenset({"shared_encoder", "shared_lm", "embed", "gen_head", "bridge"})
    encoder_roles = frozenset({"codec"})
    understanding_roles = Adapter.understanding_roles | {"codec"}  # h_v is computed from latents
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: HarmonConfig, device: torch.device | str = "cpu") -> Self:
        return weights.load(cls, config, device)

    @classmethod
    def load_tokenizer(cls, config: HarmonConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: HarmonConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "Harmon":
        return cls(config, tokenizer or weights.load_tokenizer(replace(config, weights=None, tokenizer=None)))

    def sequence(self) -> dict[str, int]:
        """Return the token counts of one sequence.

        Encoder and language model process only the visible tokens of the image, the decoder all.
        """
        buffers = self.config.mar.buffers
        given, generated = (size // self.factor for size in (self.understanding_size, self.config.image_size))
        return {"h_v": buffers + given**2, "buffers": buffers, "image": generated**2}

    @property
    def understanding_size(self) -> int:
        """Return the size in pixels of the image that RECA's h_v is computed from."""
        return self.config.understanding_size or self.config.image_size

    def views(self, task: str) -> Views:
        size, blur = self.config.image_size, self.config.hv_blur
        if task == "i2t":
            return Views(gen=None, und=View(size, fit="pad"))
        if task == "t2i":
            return Views(gen=View(size, fit="random_crop"), und=None)
        same = self.understanding_size == size and blur == 1
        return Views(
            gen=View(size, fit="stretch"), und=None if same else View(self.understanding_size, fit="stretch", blur=blur)
        )

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        features = {} if batch.gen is None else {"latents": self.latents(to_unit(batch.gen))}
        if batch.task != "t2i":
            features["h_v"] = features["latents"] if batch.und is None else self.latents(to_unit(batch.und))
        return features

    def check_templates(self, templates: Sequence[str]) -> None:
        for text in templates:
            prompt.template(self.tokenizer, text)

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return prepare(self, batch, rng)

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return compute_loss(self, prepared, features, rng)

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(
        self,
        batch: Batch,
        seeds: list[int],
        *,
        steps: int = 64,
        diffusion_steps: int = 100,
        temperature: float = 1.0,
        clip_sample_range: float | None = None,
    ) -> list[Tensor]:
        """Reconstruct images with MAR (`sampling.sample_latents`). Seeds are in [0, 2**56)."""
        return sampling.reconstruct(
            self,
            batch.text,
            self.encode(batch),
            seeds,
            steps=steps,
            diffusion=diffusion_steps,
            temperature=temperature,
            clip_sample_range=clip_sample_range,
        )

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        view = self.views("i2t").und
        assert view is not None
        return sampling.answer(self, view, images, questions, max_new_tokens)

    def export(self, folder: Path) -> list[str]:
        """Write harmon.pth, which Harmon's code loads like harmon_1.5b.pth.

        A codec and a tokenizer without a published source (random, or fitted here) are written to the same folder.
        """
        return weights.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.endswith(".bias") and ".diffloss." not in name

    def encoders(self) -> list[nn.Module]:
        return [self.codec.encoder] if isinstance(self.codec, modules.Kl16) else []

    def blocks(self) -> list[nn.Module]:
        mar = self.mar
        return [*self.llm.model.layers, *mar.encoder_blocks, *mar.decoder_blocks, *mar.diffloss.net.res_blocks]

    def repeats_blocks(self) -> bool:
        return True  # the encoder runs on h_v's image and on the target

    def config_warnings(self) -> list[str]:
        if self.understanding_size <= self.config.image_size:
            return []
        return [
            f"h_v is computed at {self.understanding_size} pixels, more than the {self.config.image_size} generated; "
            "the authors advise the lowest resolution that the model understands (model.understanding_size)"
        ]


def _role(name: str) -> str:
    part, rest = name.split(".", 1)
    if part == "llm":
        return "embed" if rest.startswith(("lm_head.", "model.embed_tokens.")) else "shared_lm"
    if part == "mar":
        return "shared_encoder" if rest.startswith(("encoder_", "z_proj", "fake_latent")) else "gen_head"
    return "codec" if part == "codec" else "bridge"
