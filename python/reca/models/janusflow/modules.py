"""JanusFlow's modules under DeepSeek's names: generation encoder and decoder, and the whole network."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reca.data.tasks import Turn
from reca.models.common.images import check_side
from reca.models.common.kl_codec import KlCodec, PatchMoments
from reca.models.janus.modules import SharedLlama, VisionModel, llama
from reca.models.janusflow import prompt
from reca.models.janusflow.config import GenerationSizes, JanusFlowConfig
from reca.models.janusflow.prompt import Layout, Segment
from reca.precision import fp32_by_default

PATCH = 2  # latents per token in height and width: the published encoder halves each side, the decoder doubles it
TIMES = 1000  # input of the time embedding for a time of 1


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation: scales channels by their norm relative to the mean over channels."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C]
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x * (self.weight * (norms / (norms.mean(-1, keepdim=True) + 1e-6)) + 1) + self.bias


class ConvNextBlock(nn.Module):
    """A ConvNeXt V2 block whose output is modulated by the time embedding."""

    def __init__(self, width: int, time_width: int, eps: float):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = LlamaRMSNorm(width, eps)
        self.channelwise_linear_1 = nn.Linear(width, 4 * width)
        self.channelwise_norm = ResponseNorm(4 * width)
        self.channelwise_linear_2 = nn.Linear(4 * width, width)
        self.cond_embeds_mapper = nn.Linear(time_width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # [B, C, h, w], [B, T]
        rows = self.norm(self.depthwise(x).movedim(1, -1))
        rows = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(rows))))
        scale, shift = self.cond_embeds_mapper(F.silu(time))[..., None, None].chunk(2, dim=1)
        return (x + rows.movedim(-1, 1)) * (1 + scale) + shift


class Blocks(nn.Module):
    """ConvNeXt blocks under their published names."""

    def __init__(self, blocks: int, width: int, time_width: int, eps: float):
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNextBlock(width, time_width, eps) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, time)
        return x


class Encoder(nn.Module):
    """The generation encoder: maps latents and a time to features for the language model."""

    def __init__(self, sizes: GenerationSizes, channels: int, time_width: int):
        super().__init__()
        self.width = sizes.width
        self.time_embed = TimestepEmbedding(sizes.width, time_width)
        self.in_conv = nn.Conv2d(channels, sizes.width, PATCH, stride=PATCH)
        self.mid_block = Blocks(sizes.encoder_blocks, sizes.width, time_width, sizes.norm_eps)

    def forward(self, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, H, W], fp32 [B] in [0, 1]
        """Return features [B, width, h, w] and the time embedding [B, T]."""
        waves = get_timestep_embedding(time * TIMES, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        embedded = self.time_embed(waves.to(self.in_conv.weight.dtype))
        return self.mid_block(self.in_conv(latents.to(self.in_conv.weight.dtype)), embedded), embedded


class Unpatchify(nn.Module):
    def __init__(self, width: int, channels: int, eps: float):
        super().__init__()
        self.norm, self.unpatch_conv = LlamaRMSNorm(width, eps), nn.Conv2d(width, channels * PATCH**2, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, h, w] -> [B, C, H, W]
        return F.pixel_shuffle(self.unpatch_conv(self.norm(x.movedim(1, -1)).movedim(-1, 1)), PATCH)


class Decoder(nn.Module):
    """The generation decoder: maps the language model's states and the encoder's features to a velocity."""

    def __init__(self, sizes: GenerationSizes, channels: int, time_width: int):
        super().__init__()
        self.input_norm = LlamaRMSNorm(sizes.width, sizes.norm_eps)
        self.mid_block = Blocks(sizes.decoder_blocks, 2 * sizes.width, time_width, sizes.norm_eps)
        self.out_convs = nn.ModuleList([Unpatchify(2 * sizes.width, channels, sizes.norm_eps)])

    def forward(
        self, rows: Tensor, features: Tensor, time: Tensor
    ) -> Tensor:  # [B, n, width], [B, width, h, w], [B, T]
        x = self.input_norm(rows).transpose(1, 2).unflatten(2, features.shape[2:])
        return self.out_convs[0](self.mid_block(torch.cat((x, features), dim=1), time))


def codec(config: JanusFlowConfig) -> KlCodec | PatchMoments:
    if config.codec == "sdxl":
        return KlCodec(config.autoencoder, quant_convs=True)
    return PatchMoments(config.patches.size, config.patches.channels)


def check_sizes(config: JanusFlowConfig, factor: int) -> None:
    """Raise ValueError for image sizes that are not whole tokens. factor: pixels per latent in height and width."""
    check_side("model.image_size", config.image_size, factor * PATCH)
    check_side("model.vision.image_size", config.vision.image_size, config.vision.patch_size)


class Network(SharedLlama):
    """JanusFlow's modules under DeepSeek's names, and the codec, which is published separately."""

    @fp32_by_default()
    def __init__(self, config: JanusFlowConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer, width, sizes = config, tokenizer, config.language.hidden_size, config.generation
        self.vocabulary = prompt.vocabulary(tokenizer, self.tokens)
        self.codec = codec(config)
        check_sizes(config, self.codec.factor)
        self.vision_und_enc_model = VisionModel(config.vision)
        self.vision_und_enc_aligner = nn.Linear(config.vision.hidden_size, width)
        self.beg_of_und_embed = nn.Parameter(torch.zeros(1, width))
        self.vision_gen_enc_model = Encoder(sizes, self.codec.channels, width)
        self.vision_gen_enc_aligner = nn.Linear(sizes.width, width)
        self.language_model = llama(config.language)
        self.vision_gen_dec_aligner_norm = LlamaRMSNorm(width, config.language.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(width, sizes.width)
        self.vision_gen_dec_model = Decoder(sizes, self.codec.channels, width)

    @property
    def side(self) -> int:
        """Return the latents of an image per side."""
        return self.config.image_size // self.codec.factor

    @property
    def image_tokens(self) -> int:
        """Return the number of tokens of an image's latents, n, without the time token before them."""
        return (self.side // PATCH) ** 2

    @property
    def longest_prompt(self) -> int:
        """Return the maximum tokens of the prompt of an image to generate: time and latents follow it."""
        return self.config.max_length - self.image_tokens - 1

    def with_image(self, text: str, system: str, most: int | None = None) -> list[Segment]:
        return prompt.begun(super().with_image(text, system, most))

    def conversation(self, turns: Sequence[Turn]) -> list[Segment]:
        return prompt.begun(super().conversation(turns))

    @torch.no_grad()
    def encode_understanding(self, pixels: Tensor) -> Tensor:
        return self.vision_und_enc_aligner(self.vision_und_enc_model.vision_tower(pixels))

    def encode_target(self, pixels: Tensor) -> dict[str, Any]:
        return {"moments": self.codec.encode(pixels)}

    def understood(self, h_v: Tensor) -> Tensor:  # [B, n, H]
        """Prepend the `begin` embedding to h_v, [B, 1 + n, H]; it has no gradient, as in the release."""
        begin = self.beg_of_und_embed.detach().to(h_v.dtype)
        return torch.cat((begin.expand(len(h_v), 1, -1), h_v), dim=1)

    def image_rows(self, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the input embeddings of noisy latents.

        latents  [B, C, H, W]
        time     fp32 [B], 0 for noise and 1 for an image

        Returns embeddings [B, 1 + n, H], of which the first is the time's; and further inputs of `velocity`: features
        [B, width, h, w] and the time embedding [B, H].
        """
        features, embedded = self.vision_gen_enc_model(latents, time)
        rows = self.vision_gen_enc_aligner(features.flatten(2).transpose(1, 2))
        return torch.cat((embedded[:, None], rows), dim=1), features, embedded

    def velocity(self, hidden: Tensor, features: Tensor, embedded: Tensor) -> Tensor:  # [B, n, H], see image_rows
        """Compute the velocity from noise to image, [B, C, H, W], from the last hidden states of latents."""
        rows = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden))
        return self.vision_gen_dec_model(rows, features, embedded)

    def predict_velocity(self, layout: Layout, h_v: Tensor | None, latents: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity of noisy latents conditioned on prompts, [B, C, H, W]."""
        rows, *beside = self.image_rows(latents, time)
        return self.velocity(self.hidden(layout, h_v, rows)[:, -self.image_tokens :], *beside)
