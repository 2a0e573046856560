"""BAGEL as an Adapter: the generation expert and its way in and out learn, everything else is frozen."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.bagel import loading, modules, prompt, sampling
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.mot import GEN, UND, Context, LanguageModel
from reca.models.base import Adapter, LossTerm, in_fp32
from reca.models.common.images import check_side, to_unit
from reca.rng import CounterRNG, RandomStream
from reca_kernels import flow_matching_add_noise, flow_matching_loss, masked_linear_cross_entropy, template_concat

MAX_PIXELS = 14 * 14 * 9 * 1024  # area of every image but those to talk about
MAX_TALK_PIXELS = 2_007_040
ENCODED_AT_ONCE = 1 << 20  # pixels in one call of the codec or of SigLIP: one image of 1024 x 1024
PROMPT_ROLES = ("und_encoder", "bridge", "und_lm", "embed")


class Bagel(Adapter):
    """Parameters have their published names, except those of `codec`.

    features of `encode`: moments, a list of fp32 [2 C, h, w]; h_v, a list of [h, w, C] rows of SigLIP before the
    connector, or of moments (hv_source vae). A cache gives them stacked where their sizes agree.
    """

    name = "bagel"
    tasks = frozenset({"reca", "t2i", "i2t"})
    abilities = frozenset({"generate", "edit", "answer"})
    trainable_roles = frozenset({"gen_lm", "gen_head"})
    condition_keys = ("h_v",)

    @in_fp32
    def __init__(self, config: BagelConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vocabulary = prompt.Vocabulary.of(tokenizer)
        width = config.language.hidden_size
        self.codec = modules.codec(config)
        check_side("model.image_size", config.image_size, self.token_side)
        numbers = self.codec.channels * config.latent_patch_size**2
        self.language_model = LanguageModel(config.language)
        self.time_embedder = modules.TimeEmbedder(width)
        self.vae2llm, self.llm2vae = nn.Linear(numbers, width), nn.Linear(width, numbers)
        self.latent_pos_embed = modules.PositionTable(config.max_latent_size, width)
        self.vit_model = modules.Vision(config.vision)
        self.vit_pos_embed = modules.PositionTable(modules.side(config.vision), width)
        self.connector = modules.Connector(config.vision.hidden_size, width)

    @classmethod
    def load(cls, config: BagelConfig, device: torch.device | str = "cpu") -> "Bagel":
        return loading.load(cls, config).to(device)

    @classmethod
    def build_meta(cls, config: BagelConfig) -> "Bagel":
        model = cls(config, loading.load_tokenizer(replace(config, tokenizer=None), None))
        return loading.as_kept(model)

    def sequence(self) -> dict[str, int]:
        image, stride = self.config.image_size // self.token_side, self.config.vision.patch_size
        given = self.config.understanding_size // (stride if self.config.hv_source == "vit" else self.token_side)
        return {"h_v": given**2, "image": image**2}

    @property
    def device(self) -> torch.device:
        return self.vae2llm.weight.device

    @property
    def token_side(self) -> int:
        """Pixels on the side of an image token."""
        return self.codec.factor * self.config.latent_patch_size

    # pixels -> features

    def views(self, task: str) -> Views:
        c, patch, side = self.config, self.config.vision.patch_size, self.token_side
        if task == "i2t":
            return Views(gen=None, und=_bound(c.answer_size, c.answer_min_size, patch, MAX_TALK_PIXELS))
        gen = _bound(c.image_size, c.image_min_size, side)
        if task == "t2i":
            return Views(gen=gen, und=None)
        size, stride = c.understanding_size, patch if c.hv_source == "vit" else side
        return Views(gen=gen, und=replace(_bound(size, size, stride), blur=c.hv_blur))

    def edit_views(self) -> Views:
        """An image to edit as the codec sees it, and what SigLIP then sees of that."""
        c = self.config
        return Views(gen=self.views("t2i").gen, und=_bound(c.edit_size, c.edit_min_size, c.vision.patch_size))

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        features = {}
        if batch.gen is not None:
            features["moments"] = self.moments(batch.gen)
        if batch.und is not None:
            vae = batch.task == "reca" and self.config.hv_source == "vae"
            features["h_v"] = self.moments(batch.und) if vae else self.look(batch.und)
        return features

    def moments(self, images: list[Tensor]) -> list[Tensor]:  # uint8 [3, H, W]
        """The codec's moments, fp32 [2 C, h, w] per image."""
        return modules.by_size([to_unit(image) for image in images], self.codec.encode, ENCODED_AT_ONCE)

    def look(self, images: list[Tensor]) -> list[Tensor]:  # uint8 [3, H, W]
        """SigLIP's rows, [h, w, C] per image."""
        return modules.by_size([to_unit(image) for image in images], self.vit_model.vision_model, ENCODED_AT_ONCE)

    # sequences -> hidden states

    def read(
        self,
        samples: list[list[prompt.Item]],
        h_v: list[Tensor] | None = None,  # [h, w, C] per Seen item
        clean: list[Tensor] | None = None,  # [C, h, w] per Clean item
        context: Context | None = None,
    ) -> tuple[Tensor, Context]:
        """What samples are given: hidden states of the understanding rows [U, D], and the context for what follows."""
        tokens = torch.cat([modules.patchify(z, self.config.latent_patch_size) for z in clean]) if clean else None
        t = torch.zeros(len(clean), dtype=torch.float32, device=self.device) if clean else None
        out, context = self.run(samples, context or self.context(len(samples)), h_v, tokens, t)
        return out[UND], context

    def velocity(
        self,
        context: Context,
        sizes: list[tuple[int, int]],  # per sample, in tokens
        tokens: Tensor,  # [sum of h w, numbers]
        t: Tensor,  # fp32 [samples] or [1], for all of them
    ) -> Tensor:  # [sum of h w, numbers]
        """The velocity of one noisy image per sample."""
        out, _ = self.run([[prompt.Noisy(*size)] for size in sizes], context, None, tokens, t)
        return self.llm2vae(out[GEN].to(self.llm2vae.weight.dtype))

    def run(
        self,
        samples: list[list[prompt.Item]],
        context: Context,
        h_v: list[Tensor] | None,
        tokens: Tensor | None,
        t: Tensor | None,
    ) -> tuple[dict[str, Tensor], Context]:
        """One pass: hidden states per expert, and the context after it."""
        layout = self.layout(samples, context.cursors)
        learn = torch.is_grad_enabled() and self.learns_prompt(h_v)
        rows, table = {}, self.language_model.model.embed_tokens.weight
        with torch.set_grad_enabled(learn):
            visual = self.visual(h_v)
            seen = [(self.vit_pos_embed.pos_embed, layout.seen_at)] if h_v else []
            dtype = self.row_type(table)
            rows[UND] = template_concat(table, visual, layout.src, adds=seen, out_dtype=dtype)
        if tokens is not None:
            # The levels of a pass are few: their embeddings are rows to add, one per image or one for all.
            level = layout.image if len(t) > 1 else torch.zeros_like(layout.image)
            added = [(self.time_embedder(t), level), (self.latent_pos_embed.pos_embed, layout.latent_at)]
            latent = self.vae2llm(tokens.to(self.vae2llm.weight.dtype))
            order = -1 - torch.arange(len(latent), device=self.device)
            dtype = self.row_type(self.vae2llm.weight)
            rows[GEN] = template_concat(table.detach(), latent, order, adds=added, out_dtype=dtype)
        out, layers = self.language_model.model(rows, layout.positions, layout.splits, context, learn)
        return out, Context(layers, layout.cursors)

    def layout(self, samples: list[list[prompt.Item]], cursors: list[int]) -> prompt.Layout:
        seen_size = modules.side(self.config.vision)
        return prompt.layout(samples, self.vocabulary, cursors, seen_size, self.config.max_latent_size).to(self.device)

    def context(self, samples: int) -> Context:
        return Context.empty(len(self.language_model.model.layers), samples)

    def visual(self, h_v: list[Tensor] | None) -> Tensor:
        """h_v in the language model's space without positions, [rows, D]."""
        if not h_v:
            return self.language_model.model.embed_tokens.weight.new_empty(0, self.config.language.hidden_size)
        return self.connector(torch.cat([rows.flatten(0, 1) for rows in h_v]))

    def learns_prompt(self, h_v: list[Tensor] | None) -> bool:
        """Whether a gradient is wanted of what stands before the image; RECA wants none."""
        if h_v and any(rows.requires_grad for rows in h_v):
            return True
        return any(p.requires_grad and self.role(name) in PROMPT_ROLES for name, p in self.named_parameters())

    @staticmethod
    def row_type(weight: Tensor) -> torch.dtype:
        """The type of the residual stream: autocast's, as in the release, or the weights'."""
        task = weight.device.type
        return torch.get_autocast_dtype(task) if torch.is_autocast_enabled(task) else weight.dtype

    # losses

    def weight(self, batch: Batch, rng: CounterRNG) -> Tensor:
        if batch.task == "i2t":
            labels = (label for turns in batch.text for label in self.conversation(turns).labels)
            count = sum(label != prompt.IGNORE for label in labels)
        else:
            side, images = self.token_side, batch.gen
            if images is None:
                side, images = self.config.latent_patch_size, batch.features["moments"]
            count = sum((image.shape[-2] // side) * (image.shape[-1] // side) for image in images)
        return torch.full((), count, dtype=torch.float32, device=batch.sample_ids.device)

    def loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        if batch.task == "i2t":
            return self.answer_loss(batch, features["h_v"])
        return self.flow_loss(batch, features, rng)

    def flow_loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        """Sum over image tokens of the mean squared error of their velocity, and the number of tokens."""
        return self.token_loss(self.prompts(batch, features, rng), features["moments"], batch.sample_ids, rng)

    def token_loss(
        self,
        given: tuple[list, list | None, list | None],  # what `read` takes: items per sample, h_v, clean latents
        moments: list[Tensor] | Tensor,  # of the image to draw, [2 C, h, w] per sample
        ids: Tensor,  # int64 [B], global ids of the samples
        rng: CounterRNG,
    ) -> LossTerm:
        patch = self.config.latent_patch_size
        latents = self.drawn(moments, rng, ids)
        sizes = [(z.shape[1] // patch, z.shape[2] // patch) for z in latents]
        t = self.level(rng, ids)
        if self.config.parity:
            latents, t = [z.bfloat16() for z in latents], t.bfloat16().float()
        noise = rng.noise(RandomStream.NOISE, ids)
        tokens = flow_matching_add_noise(latents, t, noise, patch=patch)
        _, context = self.read(*given)
        velocity = self.velocity(context, sizes, tokens, t)
        total = flow_matching_loss(velocity, latents, t, noise, patch=patch, reduction="sum")
        return LossTerm(total / velocity.shape[1], torch.full_like(total.detach(), len(velocity)))

    def drawn(self, moments: list[Tensor] | Tensor, rng: CounterRNG, ids: Tensor) -> list[Tensor]:
        """A draw of every image's posterior, fp32 [C, h, w]; the release rng too, in training and in inference."""
        latents = []
        for i, one in enumerate(moments):
            noise = rng.normal(RandomStream.POSTERIOR, ids[i : i + 1], one.numel() // 2)
            latents.append(self.codec.latents(one, noise.view(-1, *one.shape[1:])))
        return latents

    def level(self, rng: CounterRNG, ids: Tensor) -> Tensor:
        """Noise level per image, fp32 [B]: logit-normal, shifted."""
        return modules.shifted(rng.normal(RandomStream.TIMESTEP, ids)[:, 0].sigmoid(), self.config.timestep_shift)

    def prompts(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> tuple[list, list | None, list | None]:
        """What stands before the image: items per sample, and their h_v or clean latents.

        RECA drops the text of some samples and never h_v; a dropped text takes no position.
        """
        share = self.config.template_drop if batch.task == "reca" else self.config.caption_drop
        dropped = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < share).tolist()
        samples = [[] if out else [self.text(text)] for text, out in zip(batch.text, dropped, strict=True)]
        if batch.task == "t2i":
            return samples, None, None
        h_v, patch = list(features["h_v"]), self.config.latent_patch_size
        if self.config.hv_source == "vit":
            return [[prompt.Seen(*rows.shape[:2]), *rest] for rows, rest in zip(h_v, samples, strict=True)], h_v, None
        clean = [self.codec.latents(moments) for moments in h_v]
        items = [prompt.Clean(z.shape[1] // patch, z.shape[2] // patch) for z in clean]
        return [[item, *rest] for item, rest in zip(items, samples, strict=True)], None, clean

    def answer_loss(self, batch: Batch, h_v: list[Tensor]) -> LossTerm:
        """Next-token cross-entropy of the answers; logits exist for labelled rows only."""
        h_v = list(h_v)
        talks = [self.conversation(turns) for turns in batch.text]
        samples = [[prompt.Seen(*rows.shape[:2]), talk] for rows, talk in zip(h_v, talks, strict=True)]
        hidden, _ = self.read(samples, h_v)
        labels = self.layout(samples, [0] * len(samples)).labels
        labelled = sum(label != prompt.IGNORE for talk in talks for label in talk.labels)  # no GPU is waited for
        total = masked_linear_cross_entropy(
            hidden, self.language_model.lm_head.weight, labels, reduction="sum", max_labelled=labelled
        )
        return LossTerm(total, torch.full_like(total.detach(), labelled))

    # text

    def text(self, text: str) -> prompt.Text:
        return prompt.framed(prompt.encode(self.tokenizer, text), self.vocabulary)

    def conversation(self, turns: list) -> prompt.Text:
        ids = [tuple(prompt.encode(self.tokenizer, part) for part in turn) for turn in turns]
        return prompt.talk(ids, self.vocabulary)

    # inference

    def products(self) -> contextlib.AbstractContextManager:
        """Inference with mixed weights multiplies in bf16, as training with precision bf16 does."""
        mixed = self.config.dtype == "mixed"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext()

    @functools.wraps(sampling.generate)
    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.products():
            return sampling.generate(self, prompts, seeds, **options)

    @functools.wraps(sampling.edit)
    def edit(self, images: list[Tensor], instructions: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        with self.products():
            return sampling.edit(self, images, instructions, seeds, **options)

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        with self.products():
            return sampling.answer(self, images, questions, max_new_tokens)

    # the driver's questions about parameters

    def export(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        """The files of a BAGEL folder: ema.safetensors with all 1223 tensors, ae.safetensors, configs and tokenizer."""
        return loading.export(self, folder, dtype)

    def roles(self) -> dict[str, str]:
        return {name: self.role(name) for name, _ in self.named_parameters()}

    @staticmethod
    def role(name: str) -> str:
        """Of a parameter, or of a tensor of the published file."""
        part = name.split(".")[0]
        if part == "language_model":
            if name.startswith(("language_model.lm_head.", "language_model.model.embed_tokens.")):
                return "embed"
            return "gen_lm" if "_moe_gen" in name else "und_lm"
        return {"codec": "codec", "vit_model": "und_encoder", "connector": "bridge"}.get(part, "gen_head")

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return False

    def blocks(self) -> list[nn.Module]:
        return list(self.language_model.model.layers)

    def config_warnings(self) -> list[str]:
        c, found = self.config, []
        if c.hv_source == "vae":
            found.append(
                "h_v comes from the codec that also makes the target, which the model learns to copy: in the paper it "
                "ends no better than BAGEL without RECA (GenEval 78.5, 82.4 with vit). Use model.hv_source=vit"
            )
        elif c.understanding_size > (smallest := BagelConfig.understanding_size) and c.codec == "flux":
            found.append(
                f"h_v is made at {c.understanding_size} pixels; the bottleneck is tightest at the smallest size that "
                f"the model was taught to understand, {smallest} (GenEval 82.4 in the paper, at 512 it is 79.2)"
            )
        if any(p.requires_grad for p in self.vit_model.parameters()):
            found.append("train.train names und_encoder, but SigLIP runs without a gradient here: it will not change")
        return found


def _bound(size: int, least: int, stride: int, max_pixels: int = MAX_PIXELS) -> View:
    return View(size, "bound", min_size=least, stride=stride, max_pixels=max_pixels)
