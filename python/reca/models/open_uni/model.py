"""OpenUni's Adapter: InternVL3 is frozen; queries, connector, projector and SANA are trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm
from reca.models.common.images import to_unit
from reca.models.common.inference import options_of
from reca.models.open_uni import modules, sampling, weights
from reca.models.open_uni.config import OpenUniConfig
from reca.models.open_uni.loss import Prepared, compute_loss, prepare, reca_prompts
from reca.models.open_uni.modules import Network
from reca.rng import CounterRNG


class OpenUni(Network, Adapter):
    """Features of `encode`: latents [B, C, h, w] of the image to generate; h_v [B, n, H] (reca, i2t); target, latents
    [B, C, h, w] of SRUM's constraint image, if given.
    """

    name = "open_uni"
    tasks = frozenset({"reca", "t2i", "i2t", "srum"})
    trainable_roles = frozenset({"bridge", "gen_head"})
    encoder_roles = frozenset({"und_encoder", "codec"})
    understanding_roles = frozenset({"und_encoder", "und_lm", "embed"})  # the bridge is used by generation only
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: OpenUniConfig, device: torch.device | str = "cpu") -> "OpenUni":
        return weights.load(cls, config, device)

    @classmethod
    def load_tokenizer(cls, config: OpenUniConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: OpenUniConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "OpenUni":
        return weights.build_meta(cls, config, tokenizer)

    def sequence(self) -> dict[str, int]:
        latents = (self.config.image_size // modules.codec_sizes(self.config).size) ** 2
        return {"h_v": modules.hv_tokens(self.config), "queries": self.config.queries, "image": latents}

    def views(self, task: str) -> Views:
        if task == "i2t":
            return Views(gen=None, und=View(modules.understanding_size(self.config)))
        if task == "srum":
            return Views(gen=View(self.config.image_size), und=None)  # uncropped, since boxes refer to the whole image
        gen = View(self.config.image_size, fit="random_crop")
        blurred = task == "reca" and self.config.hv_blur > 1
        return Views(gen=gen, und=replace(gen, blur=self.config.hv_blur) if blurred else None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        if batch.task == "i2t":
            assert batch.und is not None
            return {"h_v": self.encode_understanding(to_unit(batch.und))}
        assert batch.gen is not None
        pixels = to_unit(batch.gen)
        features = {"latents": self.latents(pixels)}
        if batch.target is not None:
            features["target"] = self.latents(to_unit(batch.target))
        if batch.task == "reca":
            features["h_v"] = self.encode_understanding(to_unit(batch.und) if batch.und else pixels)
        return features

    def check_templates(self, templates: Sequence[str]) -> None:
        reca_prompts(self, templates)

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return prepare(self, batch, rng)

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return compute_loss(self, prepared, features, rng)

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.inference_autocast():
            return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, seeds: list[int], *, steps: int = 20) -> list[Tensor]:
        """Reconstruct images with DPM-Solver++ (`sampling.sample`). Seeds are in [0, 2**56)."""
        with self.inference_autocast():
            prompts, h_v = reca_prompts(self, batch.text), self.encode(batch)["h_v"]
            return sampling.sample(self, prompts, [], h_v, seeds, steps=steps, guidance=1.0)

    @options_of(sampling.edit)
    def edit(self, images: list[Tensor], instructions: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.inference_autocast():
            return sampling.edit(self, images, instructions, seeds, **options)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        return sampling.answer(self, images, questions, max_new_tokens)

    def export(self, folder: Path) -> list[str]:
        """Write open_uni.pth with the trained parts, which OpenUni's loader loads on top of InternVL3, SANA and DC-AE.

        InternVL3 and a codec without a published source (random, or fitted here) are written to a second file.
        """
        return weights.export(self, folder, self.inherited)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def encoders(self) -> list[nn.Module]:
        internvit = self.config.understanding == "internvit"
        tower = list(self.mllm.model.vision_tower.encoder.layer) if internvit else []
        return [self.codec.encoder, *tower] if isinstance(self.codec, AutoencoderDC) else tower

    def blocks(self) -> list[nn.Module]:
        return [*self.connector.layers, *self.transformer.transformer_blocks]


def _role(name: str) -> str:
    if name.startswith(("mllm.model.vision_tower", "mllm.model.multi_modal_projector")):
        return "und_encoder"
    if name.startswith(("mllm.lm_head", "mllm.model.language_model.embed_tokens")):
        return "embed"
    if name.startswith("mllm."):
        return "und_lm"
    if name.startswith("transformer."):
        return "gen_head"
    return "codec" if name.startswith("codec.") else "bridge"
