"""Encoders of the image in a prompt: CLIP features, EfficientNet features, or codes of the image tokenizer.

model.hv_source selects the encoder for RECA, model.understanding the one for conversations.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.data.views import View
from reca.models.common.images import per_channel
from reca.models.common.patch_codebook import PatchCodebook
from reca.models.common.pooled_features import pooled, resized
from reca.models.show_o import prompt
from reca.models.show_o.config import ShowOConfig
from reca.models.show_o.modules import Magvit, Network
from reca.models.show_o.prompt import Sample, Tokens, Vocabulary

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Conditioner(Protocol):
    """Everything that depends on the choice of encoder."""

    def view(self) -> View:
        """Return the view of an image in a conversation."""

    def reca_view(self, target: View) -> View | None:
        """Return the view that RECA's h_v is computed from; None: the target's pixels."""

    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1], of `view`
        """Encode images of conversations: fp32 [B, n, C] (CLIP) or [B, C] (EfficientNet), or codes int64 [B, n]."""

    def encode_reca(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R] in [-1, 1], of `reca_view` or the target
        """Encode images to reconstruct. The result has the form of `encode`'s."""

    def tokens(self) -> int:
        """Return the number of tokens of an image in a conversation."""

    def reca_tokens(self) -> int:
        """Return the number of tokens of h_v in RECA."""

    def reca_sample(self, template: list[int], v: Vocabulary) -> Sample:
        """Build RECA's sequence. Raises ValueError for a template that is too long."""

    def conversation_sample(self, ids: list[int], labels: list[int], v: Vocabulary, system: list[int]) -> Sample:
        """Build the sequence of a conversation, or of a question, about an image."""

    def conversation_budget(self, system: int) -> int:
        """Return the maximum number of conversation tokens. system: number of tokens of the system prompt."""

    def question(self, tokens: Tokens, text: str, v: Vocabulary) -> list[int]:
        """Tokenise a question in the format of the release's inference scripts, which follows the image."""

    def prompt_requires_grad(self) -> bool:
        """Tell whether RECA's gradients reach token embeddings and projector."""

    def warnings(self) -> list[str]:
        """Return warnings about settings with which RECA is known to fail."""


@dataclass(frozen=True)
class FeatureConditioner:
    """Features of a frozen vision tower, projected to the language model's width."""

    config: ShowOConfig
    image_tokens: int
    tower: nn.Module

    def reca_view(self, target: View) -> View | None:
        return replace(target, blur=self.config.hv_blur) if self.config.hv_blur > 1 else None

    def tokens(self) -> int:
        raise NotImplementedError

    def reca_tokens(self) -> int:
        return self.tokens()

    def reca_sample(self, template: list[int], v: Vocabulary) -> Sample:
        return prompt.reca_clip(template, v, self.config.max_reca_tokens, self.tokens(), self.image_tokens)

    def conversation_sample(self, ids: list[int], labels: list[int], v: Vocabulary, system: list[int]) -> Sample:
        return prompt.i2t_clip(ids, labels, v, system, self.tokens())

    def conversation_budget(self, system: int) -> int:
        return self.config.max_text_tokens - (self.tokens() - self.image_tokens) - system

    def question(self, tokens: Tokens, text: str, v: Vocabulary) -> list[int]:
        return tokens(f"USER: {text} ASSISTANT:")

    def prompt_requires_grad(self) -> bool:
        chosen = self.config.prompt_gradient
        return not self.config.parity if chosen is None else chosen

    def warnings(self) -> list[str]:
        return []


@dataclass(frozen=True)
class ClipConditioner(FeatureConditioner):
    """CLIP's patch features: the input of its last layer."""

    def view(self) -> View:
        return View(self.config.clip.image_size, fit="clip_crop")

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encode_understanding(clip_normalised(pixels))

    def encode_reca(self, pixels: Tensor) -> Tensor:
        return self.encode_understanding(self.reca_pixels(pixels))

    def reca_pixels(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R] in [-1, 1]
        """Resize and normalise an image to reconstruct for CLIP, [B, 3, S, S]."""
        norm = self.config.clip_norm or ("upstream" if self.config.parity else "clip")
        if norm == "upstream":
            return F.interpolate(pixels, [self.config.clip.image_size] * 2, mode="bilinear")
        return clip_normalised(resized(pixels, self.config.clip.image_size))

    def encode_understanding(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S], normalised
        """Compute patch features, fp32 [B, n, C]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.tower(pixels.float()).last_hidden_state[:, 1:]

    def tokens(self) -> int:
        return (self.config.clip.image_size // self.config.clip.patch_size) ** 2


@dataclass(frozen=True)
class EfficientNetConditioner(FeatureConditioner):
    """Pooled features of EfficientNet-Lite0, which the projector splits into a few tokens."""

    def view(self) -> View:
        return View(self.config.efficientnet.image_size, fit="center_crop")

    def encode(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)

    def encode_reca(self, pixels: Tensor) -> Tensor:
        return pooled(self.tower, pixels, self.config.efficientnet)

    def tokens(self) -> int:
        return self.config.efficientnet.tokens


@dataclass(frozen=True)
class CodeConditioner:
    """Codes of the image tokenizer, embedded like those of the generated image."""

    config: ShowOConfig
    image_tokens: int
    codec: Magvit | PatchCodebook

    def view(self) -> View:
        return View(self.config.image_size, fit="center_crop")

    def reca_view(self, target: View) -> View | None:
        return None

    def encode(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels)

    def encode_reca(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(self.reca_pixels(pixels))

    def reca_pixels(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R]
        """Shrink an image by hv_down_scale to limit the information in h_v; with hv_resize_back, resize it back."""
        size = pixels.shape[-1]
        small = F.interpolate(pixels, [size // self.config.hv_down_scale] * 2, mode="bilinear")
        return F.interpolate(small, [size] * 2, mode="bilinear") if self.config.hv_resize_back else small

    def tokens(self) -> int:
        return self.image_tokens

    def reca_tokens(self) -> int:
        return self.image_tokens // (1 if self.config.hv_resize_back else self.config.hv_down_scale**2)

    def reca_sample(self, template: list[int], v: Vocabulary) -> Sample:
        return prompt.reca_vq(template, v, self.config.max_text_tokens, self.reca_tokens(), self.image_tokens)

    def conversation_sample(self, ids: list[int], labels: list[int], v: Vocabulary, system: list[int]) -> Sample:
        return prompt.i2t_vq(ids, labels, v, self.tokens())

    def conversation_budget(self, system: int) -> int:
        return self.config.max_text_tokens

    def question(self, tokens: Tokens, text: str, v: Vocabulary) -> list[int]:
        return [v.bos, *tokens(f"USER: \n{text} ASSISTANT:")]

    def prompt_requires_grad(self) -> bool:
        return True

    def warnings(self) -> list[str]:
        config, found = self.config, []
        if config.hv_down_scale == 1:
            found.append(
                "h_v is the image's own codes at full resolution, which the model learns to copy. Shrink the "
                "image (model.hv_down_scale=2) or blur it (model.hv_down_scale=8 model.hv_resize_back=true)"
            )
        length = config.max_text_tokens + self.reca_tokens() + self.image_tokens + 5
        if length > config.phi.max_position_embeddings:
            found.append(
                f"a RECA sequence spans {length} positions, but the language model was trained with "
                f"{config.phi.max_position_embeddings}; rotary positions beyond that are extrapolated"
            )
        return found


def conditioner(net: Network, task: str) -> Conditioner:
    """Return the encoder of a task's prompt images."""
    source = net.config.understanding if task == "i2t" else net.hv_source
    if source == "clip":
        return ClipConditioner(net.config, net.image_tokens, net.clip)
    if source == "efficientnet":
        return EfficientNetConditioner(net.config, net.image_tokens, net.efficientnet)
    return CodeConditioner(net.config, net.image_tokens, net.codec)


def clip_normalised(pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    """Normalise pixels with CLIP's mean and standard deviation."""
    mean, std = (per_channel(values, pixels) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std
