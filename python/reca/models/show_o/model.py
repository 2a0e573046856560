"""Show-o's Adapter: one Phi transformer understands and generates; vision tower and image tokenizer are frozen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm
from reca.models.common.images import to_unit
from reca.models.common.inference import options_of
from reca.models.common.patch_codebook import PatchCodebook
from reca.models.show_o import sampling, weights
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.config import ShowOConfig
from reca.models.show_o.loss import Prepared, compute_loss, prepare, reca_samples
from reca.models.show_o.modules import Network
from reca.rng import CounterRNG


class ShowO(Network, Adapter):
    """Features of `encode`: codes int64 [B, N]; h_v fp32 [B, n, C] (CLIP) or [B, C] (EfficientNet), or codes [B, n]."""

    name = "show_o"
    tasks = frozenset({"reca", "i2t", "t2i"})
    trainable_roles = frozenset({"shared_lm", "embed", "bridge"})
    encoder_roles = frozenset({"und_encoder", "codec"})
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: ShowOConfig, device: torch.device | str = "cpu") -> "ShowO":
        return weights.load(cls, config).to(device)

    @classmethod
    def load_tokenizer(cls, config: ShowOConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: ShowOConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "ShowO":
        return weights.build_meta(cls, config, tokenizer)

    def sequence(self) -> dict[str, int]:
        return {"h_v": conditioner(self, "reca").reca_tokens(), "image": self.image_tokens}

    def views(self, task: str) -> Views:
        if task == "i2t":
            return Views(gen=None, und=conditioner(self, task).view())
        if task == "t2i":
            return Views(gen=View(self.config.image_size, fit="center_crop"), und=None)
        gen = View(self.config.image_size, fit="squash")
        return Views(gen=gen, und=conditioner(self, task).reca_view(gen))

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        if batch.task == "i2t":
            assert batch.und is not None
            return {"h_v": conditioner(self, "i2t").encode(to_unit(batch.und))}
        assert batch.gen is not None
        pixels = to_unit(batch.gen)
        features = {"codes": self.codec.encode(pixels)}
        if batch.task == "reca":
            given = to_unit(batch.und) if batch.und else pixels
            features["h_v"] = conditioner(self, "reca").encode_reca(given)
        return features

    def check_templates(self, templates: Sequence[str]) -> None:
        reca_samples(self, templates)

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return prepare(self, batch, rng)

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return compute_loss(self, prepared, features)

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, seeds: list[int], *, steps: int = 50, temperature: float = 1.0) -> list[Tensor]:
        """Reconstruct images with MaskGIT (`sampling.fill_codes`). Seeds are in [0, 2**56)."""
        h_v = self.encode(batch)["h_v"]
        return sampling.reconstruct(self, batch.text, h_v, seeds, steps=steps, temperature=temperature)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        return sampling.answer(self, images, questions, max_new_tokens)

    def export(self, folder: Path) -> list[str]:
        """Write config.json and pytorch_model.safetensors as Show-o publishes them.

        Frozen parts and a tokenizer without a published source (random, or fitted here) are written to subfolders.
        """
        return weights.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return "bias" not in name if self.config.parity else super().decays(name, parameter)

    def encoders(self) -> list[nn.Module]:
        tower = list(self.clip.encoder.layers) if self.uses_clip else []
        return tower if isinstance(self.codec, PatchCodebook) else [self.codec.encoder, *tower]

    def blocks(self) -> list[nn.Module]:
        return list(self.showo.model.layers)

    def config_warnings(self) -> list[str]:
        return conditioner(self, "reca").warnings()


def _role(name: str) -> str:
    part = name.split(".")[0]
    if part == "showo":
        return "embed" if name.startswith(("showo.lm_head.", "showo.model.embed_tokens.")) else "shared_lm"
    return {"mm_projector": "bridge", "clip": "und_encoder", "efficientnet": "und_encoder", "codec": "codec"}[part]
