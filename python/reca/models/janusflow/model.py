"""JanusFlow's Adapter: one Llama understands and generates; SigLIP and SDXL's autoencoder are frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.models.base import Adapter, LossTerm
from reca.models.common.inference import options_of
from reca.models.common.kl_codec import KlCodec
from reca.models.janus.sampling import answer
from reca.models.janusflow import sampling, weights
from reca.models.janusflow.config import JanusFlowConfig
from reca.models.janusflow.loss import Prepared, compute_loss, prepare
from reca.models.janusflow.modules import Network
from reca.rng import CounterRNG


class JanusFlow(Network, Adapter):
    """Features of `encode`: moments [B, 2 C, H, W] of the image to generate; h_v [B, n, H]."""

    name = "janusflow"
    tasks = frozenset({"reca", "i2t", "t2i"})
    trainable_roles = frozenset({"shared_lm", "bridge", "gen_head"})
    encoder_roles = frozenset({"und_encoder", "codec"})
    understanding_roles = frozenset({"und_encoder", "shared_lm", "embed"})  # the bridge is used by generation only
    condition_keys = ("h_v",)

    @classmethod
    def load(cls, config: JanusFlowConfig, device: torch.device | str = "cpu") -> "JanusFlow":
        return weights.load(cls, config).to(device)

    @classmethod
    def load_tokenizer(cls, config: JanusFlowConfig, local: bool = False) -> PreTrainedTokenizerBase:
        return weights.load_tokenizer(config, local)

    @classmethod
    def build_meta(cls, config: JanusFlowConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> "JanusFlow":
        return weights.build_meta(cls, config, tokenizer)

    def sequence(self) -> dict[str, int]:
        return {"h_v": self.hv_tokens, "time": 1, "image": self.image_tokens}

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return prepare(self, batch, rng)

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        return compute_loss(self, prepared, features, rng)

    @options_of(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        return sampling.generate(self, prompts, seeds, **options)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, seeds: list[int], *, steps: int = 30) -> list[Tensor]:
        """Reconstruct images with Euler's method (`sampling.denoise`). Seeds are in [0, 2**56)."""
        return sampling.reconstruct(self, batch, self.encode(batch)["h_v"], seeds, steps=steps)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        return answer(self, images, questions, max_new_tokens)

    def export(self, folder: Path) -> list[str]:
        """Write the files that DeepSeek's code reads, and a codec without a published source into a subfolder."""
        return weights.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Tell whether weight decay applies: to matrices, not to vectors, some of which are stored as [1, 1, 1, C]."""
        return parameter.ndim >= 2 and ".channelwise_norm." not in name

    def encoders(self) -> list[nn.Module]:
        tower = list(self.vision_und_enc_model.vision_tower.blocks)
        return [self.codec.autoencoder.encoder, *tower] if isinstance(self.codec, KlCodec) else tower

    def blocks(self) -> list[nn.Module]:
        ends = (self.vision_gen_enc_model, self.vision_gen_dec_model)
        return [*self.language_model.model.layers, *(block for end in ends for block in end.mid_block.res_blocks)]


def _role(name: str) -> str:
    part = name.split(".")[0]
    if part == "language_model":
        embed = name.startswith(("language_model.lm_head.", "language_model.model.embed_tokens."))
        return "embed" if embed else "shared_lm"
    if part.startswith("vision_und_") or part == "beg_of_und_embed":
        return "und_encoder"
    if part == "codec":
        return "codec"
    return "bridge" if part.startswith("vision_gen_enc_") else "gen_head"
