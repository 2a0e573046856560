"""BAGEL's Adapter: generation expert and latent projections are trained, everything else is frozen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import Views
from reca.models.bagel import loss, modules, sampling, views, weights
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.transformer import GEN
from reca.models.base import Adapter, LossTerm
from reca.models.common.inference import options_of
from reca.models.common.kl_codec import KlCodec
from reca.rng import CounterRNG


class Bagel(modules.Network, Adapter):
    """Features of `encode`, lists of one tensor per sample: moments fp32 [2 C, h, w] of the image to generate; target,
    moments of SRUM's constraint image, if given; h_v [h, w, C], SigLIP's tokens before the connector, or moments with
    hv_source vae. Features from a cache are stacked if all sizes agree.
    """

    name = "bagel"
    tasks = frozenset({"reca", "t2i", "i2t", "srum"})
    trainable_roles = weights.TRAINED
    encoder_roles = frozenset({"und_encoder", "codec"})
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: BagelConfig, device: torch.device | str = "cpu") -> "Bagel":
        return weights.load(cls, config, device)

    @classmethod
    def load_tokenizer(cls, config: BagelConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: BagelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "Bagel":
        tokenizer = tokenizer or weights.load_tokenizer(replace(config, weights=None, tokenizer=None))
        return weights.to_kept_types(cls(config, tokenizer))

    def sequence(self) -> dict[str, int]:
        image, stride = self.config.image_size // self.token_side, self.config.vision.patch_size
        given = self.config.understanding_size // (stride if self.config.hv_source == "vit" else self.token_side)
        return {"h_v": given**2, "image": image**2}

    # training

    def views(self, task: str) -> Views:
        return views.task_views(self, task)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        features = {}
        if batch.gen is not None:
            features["moments"] = self.moments(batch.gen)
        if batch.target is not None:
            features["target"] = self.moments(batch.target)
        if batch.und is not None:
            vae = batch.task == "reca" and self.config.hv_source == "vae"
            features["h_v"] = self.moments(batch.und) if vae else self.encode_understanding(batch.und)
        return features

    def check_templates(self, templates: Sequence[str]) -> None:
        images = sum(tokens + 2 for tokens in self.sequence().values())  # at most; two more around each
        for text in templates:
            loss.template(self, text, images)

    def prepare(self, batch: Batch, rng: CounterRNG) -> loss.Prepared:
        return loss.prepare(self, batch, rng)

    def loss(self, prepared: loss.Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return loss.compute_loss(self, prepared, features, rng)

    # inference

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.inference_autocast():
            return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, seeds: list[int], *, steps: int = 50, shift: float = 3.0) -> list[Tensor]:
        """Reconstruct images with Euler steps (`sampling.denoise`). Seeds are in [0, 2**56)."""
        with self.inference_autocast():
            return sampling.reconstruct(self, batch, self.encode(batch)["h_v"], seeds, steps=steps, shift=shift)

    @options_of(sampling.edit)
    def edit(self, images: list[Tensor], instructions: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.inference_autocast():
            return sampling.edit(self, images, instructions, seeds, **options)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        with self.inference_autocast():
            return sampling.answer(self, images, questions, max_new_tokens)

    # parameters and files

    def export(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        """Write a folder in BAGEL's format: ema.safetensors with all tensors, ae.safetensors, configs and tokenizer."""
        return weights.export(self, folder, dtype)

    def roles(self) -> dict[str, str]:
        return {name: modules.role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return False

    def encoders(self) -> list[nn.Module]:
        tower = list(self.vit_model.vision_model.encoder.layers)
        return [self.codec.autoencoder.encoder, *tower] if isinstance(self.codec, KlCodec) else tower

    def blocks(self) -> list[nn.Module]:
        return list(self.language_model.model.layers)

    def repeats_blocks(self) -> bool:
        trained = (name for block in self.blocks() for name, p in block.named_parameters() if p.requires_grad)
        return self.config.hv_source == "vae" or not all(GEN in name for name in trained)

    def config_warnings(self) -> list[str]:
        c, found = self.config, []
        if c.hv_source == "vae":
            found.append(
                "h_v comes from the codec that also encodes the target, so the model learns to copy: in the paper the "
                "result is no better than BAGEL without RECA (GenEval 78.5, 82.4 with vit). Use model.hv_source=vit"
            )
        elif c.understanding_size > (smallest := BagelConfig.understanding_size) and c.codec == "flux":
            found.append(
                f"h_v is computed at {c.understanding_size} pixels; the bottleneck is tightest at the smallest size "
                f"that the model was trained to understand, {smallest} (GenEval in the paper: 82.4, and 79.2 at 512)"
            )
        return found
