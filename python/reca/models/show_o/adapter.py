"""Show-o as an Adapter: one Phi transformer understands and generates; CLIP and the image tokenizer are frozen."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PhiForCausalLM, PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm, in_fp32
from reca.models.common.images import per_channel, to_unit
from reca.models.common.inference import check_pairs, warn_of_cut
from reca.models.common.text import Remembered, encode
from reca.models.show_o import loading, modules, prompt, sampling
from reca.models.show_o.config import ShowOConfig
from reca.models.show_o.prompt import IGNORE
from reca.rng import CounterRNG, RandomStream
from reca_kernels import masked_linear_cross_entropy, template_concat
from reca_kernels.host import on_device

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ShowO(Adapter):
    """Parameters `showo.*` and `mm_projector.*` have their published names; `codec` and `clip` are frozen.

    features of `encode`: codes int64 [B, N]; h_v, CLIP features fp32 [B, n, C] or condition codes int64 [B, n].
    """

    name = "show_o"
    tasks = frozenset({"reca", "i2t", "t2i"})
    abilities = frozenset({"generate", "answer"})
    trainable_roles = frozenset({"shared_lm", "embed", "bridge"})
    condition_keys = ("h_v",)

    @in_fp32
    def __init__(self, config: ShowOConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.codec = modules.codec(config)
        self.vocabulary = prompt.Vocabulary.of(tokenizer, self.codec.entries)
        modules.check_sizes(config, self.codec.factor)
        self.showo = PhiForCausalLM(modules.phi_config(config.phi, self.vocabulary.size))
        if self.uses_clip:
            self.clip = modules.clip_tower(config.clip)
            self.mm_projector = modules.projector(config.clip.hidden_size, config.phi.hidden_size)
        self.tokens = Remembered(functools.partial(encode, tokenizer))

    @classmethod
    def load(cls, config: ShowOConfig, device: torch.device | str = "cpu") -> "ShowO":
        return loading.load(cls, config).to(device)

    @classmethod
    def build_meta(cls, config: ShowOConfig) -> "ShowO":
        return loading.build_meta(cls, config)

    def sequence(self) -> dict[str, int]:
        if self.hv_source == "clip":
            given = self.clip_tokens
        else:
            given = self.image_tokens // (1 if self.config.hv_resize_back else self.config.hv_down_scale**2)
        return {"h_v": given, "image": self.image_tokens}

    @property
    def device(self) -> torch.device:
        return self.showo.lm_head.weight.device

    @property
    def hv_source(self) -> str:
        return self.config.hv_source or self.config.understanding

    @property
    def uses_clip(self) -> bool:
        return "clip" in (self.config.understanding, self.hv_source)

    @property
    def image_tokens(self) -> int:
        """N, the codes of an image."""
        return (self.config.image_size // self.codec.factor) ** 2

    @property
    def clip_tokens(self) -> int:
        """Rows of h_v that CLIP gives."""
        return (self.config.clip.image_size // self.config.clip.patch_size) ** 2

    # pixels -> features

    def views(self, task: str) -> Views:
        if task == "i2t":
            clip = self.config.understanding == "clip"
            size = self.config.clip.image_size if clip else self.config.image_size
            return Views(gen=None, und=View(size, fit="center_crop"))
        if task == "t2i":
            return Views(gen=View(self.config.image_size, fit="center_crop"), und=None)
        gen = View(self.config.image_size, fit="squash")
        blurred = self.hv_source == "clip" and self.config.hv_blur > 1
        return Views(gen=gen, und=replace(gen, blur=self.config.hv_blur) if blurred else None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        if batch.task == "i2t":
            pixels = to_unit(batch.und)
            clip = self.config.understanding == "clip"
            return {"h_v": self.look(clip_normalised(pixels)) if clip else self.codec.encode(pixels)}
        pixels = to_unit(batch.gen)
        features = {"codes": self.codec.encode(pixels)}
        if batch.task == "reca":
            clip = self.hv_source == "clip"
            seen = to_unit(batch.und) if batch.und else pixels
            features["h_v"] = self.look(self.clip_view(seen)) if clip else self.codec.encode(self.shrunk(seen))
        return features

    def clip_view(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R] in [-1, 1]
        """What CLIP gets of the image to reconstruct, [B, 3, S, S]."""
        size = [self.config.clip.image_size] * 2
        norm = self.config.clip_norm or ("upstream" if self.config.parity else "clip")
        if norm == "upstream":
            return F.interpolate(pixels, size, mode="bilinear")
        return clip_normalised(F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1))

    def shrunk(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R]
        """The bottleneck of h_v from codes: a small copy, or one blurred by resizing it back."""
        size = pixels.shape[-1]
        small = F.interpolate(pixels, [size // self.config.hv_down_scale] * 2, mode="bilinear")
        return F.interpolate(small, [size] * 2, mode="bilinear") if self.config.hv_resize_back else small

    def look(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S]
        """CLIP's patch features before its last layer, fp32 [B, n, C]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.clip(pixels.float()).last_hidden_state[:, 1:]

    # sequences -> hidden states

    def visual(self, h_v: Tensor) -> Tensor:
        """h_v in the language model's space, [B, n, H], from CLIP features [B, n, C] or codes [B, n]."""
        if h_v.is_floating_point():
            return self.mm_projector(h_v.to(self.mm_projector[0].weight.dtype))
        return self.showo.model.embed_tokens(h_v + self.vocabulary.offset)

    def embed(self, src: Tensor, h_v: Tensor | None) -> Tensor:  # int32 [B, L]
        """Input embeddings [B, L, H]."""
        table = self.showo.model.embed_tokens.weight
        visual = table.new_empty(0, table.shape[1]) if h_v is None else self.visual(h_v).to(table.dtype)
        return template_concat(table, visual, src)

    def hidden(self, layout: prompt.Layout, h_v: Tensor | None = None, learn_prompt: bool = True) -> Tensor:
        """Last hidden states [B, L, H]. learn_prompt: a gradient reaches token embeddings and projector."""
        with torch.set_grad_enabled(learn_prompt and torch.is_grad_enabled()):
            embeddings = self.embed(layout.src, h_v)
        return self.showo.model(
            inputs_embeds=embeddings,
            position_ids=layout.position_ids,
            plan=layout.plan(),
            use_cache=False,
        ).last_hidden_state

    def code_logits(self, layout: prompt.Layout, codes: Tensor) -> Tensor:  # int64 [B, N]; `entries` is the mask
        """Logits over the codebook at the image's positions, [B, N, entries]."""
        v, head = self.vocabulary, self.showo.lm_head
        layout.src[:, self.image] = (codes + v.offset).int()
        hidden = self.hidden(layout)[:, self.image]
        return F.linear(hidden, head.weight[v.offset : v.mask], head.bias[v.offset : v.mask])

    @property
    def image(self) -> slice:
        """Where the image's codes stand in every layout that has one."""
        return slice(-1 - self.image_tokens, -1)

    # losses

    def weight(self, batch: Batch, rng: CounterRNG) -> Tensor:
        device = batch.sample_ids.device
        if batch.task == "i2t":
            labels = (label for turns in batch.text for label in self.conversation(turns)[1])
            learned = sum(label != IGNORE for label in labels)
            return torch.full((), learned, dtype=torch.float32, device=device)
        masked = float(self.masked_count(rng, batch.host_ids).sum())
        learned = masked if batch.task == "reca" else masked + 2 * len(batch)  # soi and eoi are learned too
        return torch.full((), learned, dtype=torch.float32, device=device)

    def loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        """Sum over predicted tokens of the cross-entropy over the whole vocabulary, and their number."""
        return {"reca": self.reca_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss}[batch.task](batch, features, rng)

    def reca_loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        h_v, n, v = features["h_v"], self.image_tokens, self.vocabulary
        clip = self.hv_source == "clip"
        make, slots = (prompt.reca_clip, self.config.reca_slots) if clip else (prompt.reca_vq, self.config.text_slots)
        samples = [make(self.template(text), v, slots, h_v.shape[1], n) for text in batch.text]
        layout, labelled = self.hidden_image(samples, features["codes"], batch, rng)
        return self.cross_entropy(self.hidden(layout, h_v, self.learns_prompt or not clip), layout.labels, labelled)

    @property
    def learns_prompt(self) -> bool:
        """Whether RECA with clip sends a gradient into token embeddings and projector."""
        chosen = self.config.prompt_gradient
        return not self.config.parity if chosen is None else chosen

    def t2i_loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        dropped = rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < self.config.caption_drop
        texts = [[] if drop else self.tokens(text) for text, drop in zip(batch.text, dropped.tolist(), strict=True)]
        samples = [prompt.t2i(text, self.vocabulary, self.config.text_slots, self.image_tokens) for text in texts]
        layout, labelled = self.hidden_image(samples, features["codes"], batch, rng)
        return self.cross_entropy(self.hidden(layout), layout.labels, labelled)

    def i2t_loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        h_v = features["h_v"]
        samples = [self.talk(*self.conversation(turns), h_v.shape[1]) for turns in batch.text]
        layout = prompt.layout(samples, self.vocabulary)
        labelled = _labelled(layout)
        layout = layout.to(self.device)
        return self.cross_entropy(self.hidden(layout, h_v), layout.labels, labelled)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, labelled: int | None = None) -> LossTerm:
        """hidden [B, L, H], labels [B, L]. labelled: how many there are; a GPU that has to be asked is waited for."""
        head = self.showo.lm_head
        total = masked_linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            labels.flatten(),
            head.bias,
            reduction="sum",
            max_labelled=labelled,
        )
        return LossTerm(total, (labels != IGNORE).sum().float())

    def hidden_image(
        self, samples: list[prompt.Sample], codes: Tensor, batch: Batch, rng: CounterRNG
    ) -> tuple[prompt.Layout, int]:
        """The layout of an image to predict, on the device, and how many of its rows carry a label."""
        layout, masked = prompt.layout(samples, self.vocabulary), self.masked(rng, batch.host_ids)
        labelled = _labelled(layout) + int(masked.sum())
        layout = layout.to(self.device)
        self.hide(layout, codes, on_device(masked, self.device))
        return layout, labelled

    def hide(self, layout: prompt.Layout, codes: Tensor, masked: Tensor) -> None:  # int64, bool [B, N]
        """Put the image into the layout: masked codes as the mask token, with themselves as labels."""
        ids = codes + self.vocabulary.offset
        layout.src[:, self.image] = torch.where(masked, self.vocabulary.mask, ids).int()
        layout.labels[:, self.image] = torch.where(masked, ids, IGNORE)

    def masked(self, rng: CounterRNG, sample_ids: Tensor) -> Tensor:  # int64 [B]
        """Which codes of an image are hidden, bool [B, N]."""
        order = rng.uniform(RandomStream.MASK_ORDER, sample_ids, self.image_tokens).argsort(dim=-1, stable=True)
        return order < self.masked_count(rng, sample_ids)

    def masked_count(self, rng: CounterRNG, sample_ids: Tensor) -> Tensor:  # int64 [B]
        """How many, fp32 [B, 1]: cos(pi/2 t) of them, at least one."""
        share = sampling.cosine(rng.uniform(RandomStream.MASK_RATE, sample_ids)).clamp(min=0)
        return (self.image_tokens * share).round().clamp(min=1)

    # text

    def template(self, text: str) -> list[int]:
        return self.tokens(prompt.TEMPLATE.format(text))

    def conversation(self, turns: list) -> tuple[list[int], list[int]]:
        """Ids and labels, cut to what the text budget leaves beside the image and the system prompt."""
        budget = self.conversation_budget(len(self.tokens(self.config.system_prompt)))
        if budget < 1:
            raise ValueError(
                f"model.text_slots={self.config.text_slots} leaves {budget} tokens for a conversation beside "
                f"{self.clip_tokens} rows of h_v and the system prompt; raise it by {1 - budget} or more"
            )
        ids, labels = prompt.conversation(self.tokens, turns, self.vocabulary)
        return ids[:budget], labels[:budget]

    def conversation_budget(self, system: int) -> int:
        """Most tokens of a conversation, so that it is as long as a text-to-image sequence. system: of that prompt."""
        if self.config.understanding == "vq":
            return self.config.text_slots
        return self.config.text_slots - (self.clip_tokens - self.image_tokens) - system

    def talk(self, ids: list[int], labels: list[int], visual: int) -> prompt.Sample:
        """A conversation behind `visual` rows of h_v."""
        if self.config.understanding == "vq":
            return prompt.i2t_vq(ids, labels, self.vocabulary, visual)
        return prompt.i2t_clip(ids, labels, self.vocabulary, self.tokens(self.config.system_prompt), visual)

    # inference

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int = 50,
        guidance: float = 5.0,
        temperature: float = 1.0,
        batch: int = 64,
    ) -> list[Tensor]:
        """Images by MaskGIT (`sampling.draw_codes`), `batch` at a time. Seeds lie in [0, 2**56)."""
        check_pairs(prompts=prompts, seeds=seeds)
        images, ids = [], [self.tokens(text) for text in prompts]
        warn_of_cut(ids, self.config.sampling_slots - 2)  # bos and eos stand there too
        for i in range(0, len(prompts), batch):
            texts = ids[i : i + batch]
            chance = sampling.Chance(torch.tensor(seeds[i : i + batch], device=self.device))
            codes = sampling.draw_codes(self, texts, chance, steps=steps, guidance=guidance, temperature=temperature)
            pixels = (self.codec.decode(codes) + 1) / 2
            images += list(pixels.clamp(0, 1).mul(255).round().to(torch.uint8))
        return images

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        check_pairs(images=images, questions=questions)
        view = self.views("i2t").und
        und = [_center_crop(image.to(self.device), view.size) for image in images]
        h_v = self.encode(Batch("i2t", torch.arange(len(und)), questions, und=und))["h_v"]
        return sampling.answer(self, h_v, questions, max_new_tokens)

    # the driver's questions about parameters

    def export(self, folder: Path) -> list[str]:
        """config.json and pytorch_model.safetensors as Show-o publishes them.

        Frozen parts and a tokenizer that exist nowhere else (random, or fitted here) go into folders beside.
        """
        return loading.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return "bias" not in name if self.config.parity else super().decays(name, parameter)

    def blocks(self) -> list[nn.Module]:
        return list(self.showo.model.layers)

    def config_warnings(self) -> list[str]:
        config, found = self.config, []
        if self.hv_source == "clip":
            return found
        if config.hv_down_scale == 1:
            found.append(
                "h_v is made of the image's own codes at full resolution, which the model learns to copy. Shrink the "
                "image (model.hv_down_scale=2) or blur it (model.hv_down_scale=8 model.hv_resize_back=true)"
            )
        given = self.image_tokens // (1 if config.hv_resize_back else config.hv_down_scale**2)
        length = config.text_slots + given + self.image_tokens + 5
        if length > config.phi.max_position_embeddings:
            found.append(
                f"a RECA sequence counts {length} positions, but the language model was trained on "
                f"{config.phi.max_position_embeddings}; its rotary positions are extrapolated"
            )
        return found


def clip_normalised(pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    mean, std = (per_channel(values, pixels) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def _labelled(layout: prompt.Layout) -> int:
    """How many rows carry a label. layout: still on the host, so that no GPU is waited for."""
    return int((layout.labels != IGNORE).sum())


def _center_crop(image: Tensor, size: int) -> Tensor:  # uint8 [3, H, W]
    """The short side resized to `size`, the middle square of it, uint8 [3, size, size]."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    sides = [max(size, round(height * scale)), max(size, round(width * scale))]
    whole = F.interpolate(image[None].float(), sides, mode="bicubic", antialias=True)[0].clamp(0, 255).round()
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    return whole[:, top : top + size, left : left + size].to(torch.uint8)


def _role(name: str) -> str:
    part = name.split(".")[0]
    if part == "showo":
        return "embed" if name.startswith(("showo.lm_head.", "showo.model.embed_tokens.")) else "shared_lm"
    return {"mm_projector": "bridge", "clip": "und_encoder", "codec": "codec"}[part]
