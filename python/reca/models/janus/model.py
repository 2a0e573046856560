"""Janus-Pro's Adapter: one Llama understands and generates; SigLIP and the image tokenizer are frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.models.base import Adapter, LossTerm
from reca.models.common.inference import options_of
from reca.models.janus import sampling, weights
from reca.models.janus.config import JanusConfig
from reca.models.janus.loss import Prepared, compute_loss, prepare
from reca.models.janus.modules import Network, Vq
from reca.rng import CounterRNG


class Janus(Network, Adapter):
    """Features of `encode`: codes int64 [B, N] of the image to generate; h_v [B, n, H]."""

    name = "janus"
    tasks = frozenset({"reca", "i2t", "t2i"})
    trainable_roles = frozenset({"shared_lm", "bridge", "gen_head"})
    encoder_roles = frozenset({"und_encoder", "codec"})
    understanding_roles = frozenset({"und_encoder", "shared_lm", "embed"})  # the bridge is used by generation only
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: JanusConfig, device: torch.device | str = "cpu") -> "Janus":
        return weights.load(cls, config).to(device)

    @classmethod
    def load_tokenizer(cls, config: JanusConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: JanusConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "Janus":
        return weights.build_meta(cls, config, tokenizer)

    def sequence(self) -> dict[str, int]:
        return {"h_v": self.hv_tokens, "image": self.image_tokens}

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return prepare(self, batch, rng)

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return compute_loss(self, prepared, features)

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, seeds: list[int], *, temperature: float = 1.0) -> list[Tensor]:
        """Reconstruct images code by code (`sampling.continue_codes`). Seeds are in [0, 2**56)."""
        return sampling.reconstruct(self, batch, self.encode(batch)["h_v"], seeds, temperature=temperature)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        return sampling.answer(self, images, questions, max_new_tokens)

    def export(self, folder: Path) -> list[str]:
        """Write the files that DeepSeek's code or transformers reads, as set by model.export_layout."""
        return weights.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def encoders(self) -> list[nn.Module]:
        tower = list(self.vision_model.vision_tower.blocks)
        return [self.gen_vision_model.encoder, *tower] if isinstance(self.gen_vision_model, Vq) else tower

    def blocks(self) -> list[nn.Module]:
        return list(self.language_model.model.layers)


def _role(name: str) -> str:
    part = name.split(".")[0]
    if part == "language_model":
        embed = name.startswith(("language_model.lm_head.", "language_model.model.embed_tokens."))
        return "embed" if embed else "shared_lm"
    if part in ("vision_model", "aligner"):
        return "und_encoder"
    return {"gen_vision_model": "codec", "gen_head": "gen_head"}.get(part, "bridge")
