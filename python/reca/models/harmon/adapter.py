"""Harmon as an Adapter: one MAR encoder and one Qwen2 understand and generate; only the image codec is frozen."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.pixels import make_view
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm, in_fp32
from reca.models.common.images import to_unit
from reca.models.common.inference import check_multiple, check_pairs, warn_of_cut
from reca.models.common.text import Remembered, control
from reca.models.harmon import loading, modules, prompt, sampling
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.masking import Masking, hidden_counts
from reca.models.harmon.prompt import IGNORE, Prompt
from reca.rng import CounterRNG, RandomStream
from reca_kernels import (
    diffusion_add_noise,
    diffusion_loss,
    diffusion_schedule,
    masked_linear_cross_entropy,
    template_concat,
)
from reca_kernels.host import on_device


class Harmon(Adapter):
    """Parameters have their published names; those of `vae` are named as diffusers names them.

    features of `encode`: latents fp32 [B, m, n, C], of the image to draw; seen, of the image that h_v is made of.
    """

    name = "harmon"
    tasks = frozenset({"reca", "i2t", "t2i"})
    abilities = frozenset({"generate", "answer"})
    trainable_roles = frozenset({"shared_encoder", "shared_lm", "embed", "gen_head", "bridge"})
    condition_keys = ("seen",)

    @in_fp32
    def __init__(self, config: HarmonConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        modules.check_sizes(config)
        self.config, self.tokenizer = config, tokenizer
        width, mar = config.language.hidden_size, config.mar.width
        self.llm = modules.language_model(config.language)
        self.mar = modules.Mar(config.mar, modules.channels(config))
        self.proj_in = modules.projector(mar, width, width)
        self.proj_out = modules.projector(width, mar, width)
        self.vae = modules.codec(config)
        self.conversation = Remembered(functools.partial(prompt.conversation, tokenizer))

    @classmethod
    def load(cls, config: HarmonConfig, device: torch.device | str = "cpu") -> "Harmon":
        return loading.load(cls, config, device)

    @classmethod
    def build_meta(cls, config: HarmonConfig) -> "Harmon":
        return cls(config, loading.load_tokenizer(replace(config, tokenizer=None), None))

    def sequence(self) -> dict[str, int]:
        """The encoder and the language model see what is visible of the image, the decoder all of it."""
        factor, buffers = modules.factor(self.config), self.config.mar.buffers
        given, drawn = (size // factor for size in (self.understanding_size, self.config.image_size))
        return {"h_v": buffers + given**2, "buffers": buffers, "image": drawn**2}

    @property
    def device(self) -> torch.device:
        return self.mar.mask_token.device

    @property
    def understanding_size(self) -> int:
        """Pixels on the side of the image that RECA's h_v is made of."""
        return self.config.understanding_size or self.config.image_size

    # pixels -> features

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
            features["seen"] = features["latents"] if batch.und is None else self.latents(to_unit(batch.und))
        return features

    def latents(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Scaled latents of tokens, channels last, fp32 [B, m, n, C]."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            tokens = F.pixel_unshuffle(self.vae.latents(pixels.float()), self.config.mar.patch_size)
            return tokens.movedim(1, -1).contiguous() * self.config.autoencoder.scale

    def pixels(self, latents: Tensor) -> Tensor:  # [B, m, n, C]
        """What they decode to, fp32 [B, 3, H, W], about [-1, 1]."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            tokens = latents.float().movedim(-1, 1) / self.config.autoencoder.scale
            return self.vae.pixels(F.pixel_shuffle(tokens, self.config.mar.patch_size))

    # sequences -> hidden states

    def states(self, layout: prompt.Layout, visual: Tensor) -> Tensor:  # [B, n, H]
        """Last hidden states of the language model, [B, L, H]. Causal and padded on the right: no mask."""
        embeddings = template_concat(self.llm.model.embed_tokens.weight, visual, layout.src)
        # None: no mask beside the causal one. Left to itself, transformers asks the device whether it needs another.
        mask = {"full_attention": None}
        return self.llm.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state

    def understood(self, encoded: Tensor) -> Tensor:  # [B, buffers + S, D]
        """h_v of a fully visible image, buffers first, [B, buffers + S, H]."""
        return self._softened(self.proj_in(encoded), encoded.shape[1])

    def condition(
        self,
        prompts: list[Prompt],
        encoded: Tensor,  # [B, buffers + V, D], of the visible tokens
        masking: Masking,
        grid: tuple[int, int],
        seen: Tensor | None = None,  # [B, buffers + S', D], of the image that h_v is made of
    ) -> Tensor:  # [B, m n, D]
        """What the diffusion head is conditioned on, for every token of the image to draw."""
        buffers, given = self.config.mar.buffers, 0
        if seen is None:
            visual = self.proj_in(encoded)
        else:
            given = seen.shape[1] - buffers
            visual = self._softened(self.proj_in(torch.cat((seen, encoded), dim=1)), seen.shape[1])
        layout = prompt.layout(prompts, buffers, given, masking.lengths).to(encoded.device)
        hidden = self.states(layout, visual)
        tail = layout.rows[:, -encoded.shape[1] :]
        answered = hidden.flatten(0, 1).index_select(0, tail.flatten()).unflatten(0, tail.shape)
        return self.mar.decode(encoded + self.proj_out(answered), masking.visible, masking.real, grid)

    def _softened(self, visual: Tensor, rows: int) -> Tensor:
        """The same numbers; of the gradient, what reaches the first `rows` rows is scaled."""
        scale = self.config.hv_grad_scale
        if visual.requires_grad and scale != 1:
            visual.register_hook(lambda grad: torch.cat((grad[:, :rows] * scale, grad[:, rows:]), dim=1))
        return visual

    # losses

    def weight(self, batch: Batch, rng: CounterRNG) -> Tensor:
        if batch.task == "i2t":
            counts = [sum(label != IGNORE for label in self.conversation(tuple(turns)).labels) for turns in batch.text]
            weight = sum(counts)
        else:
            side = self.config.image_size // modules.factor(self.config)
            weight = int(self.hidden_counts(rng, batch.host_ids, side * side).sum()) * self.config.mar.repeats
        return torch.full((), weight, dtype=torch.float32, device=batch.sample_ids.device)

    def loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        """Sum over hidden tokens and their timesteps of the diffusion loss, or over answers of the cross-entropy."""
        with self._dropout(batch, rng):
            if batch.task == "i2t":
                return self.answer_loss(batch, features["seen"])
            return self.drawing_loss(batch, features, rng)

    def drawing_loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        seen = self.mar.encode(features["seen"]) if batch.task == "reca" else None
        return self.token_loss(self.prompts(batch, rng), features["latents"], batch.host_ids, rng, seen)

    def token_loss(
        self,
        prompts: list[Prompt],
        latents: Tensor,  # [B, m, n, C]
        ids: Tensor,  # int64 [B], global ids of the samples, on the host
        rng: CounterRNG,
        seen: Tensor | None = None,  # [B, buffers + S', D], the encoded image that h_v is made of
    ) -> LossTerm:
        """Sum over hidden tokens and their timesteps, and how many these are."""
        repeats = self.config.mar.repeats
        grid = tuple(latents.shape[1:3])
        size = grid[0] * grid[1]
        counts = self.hidden_counts(rng, ids, size)
        masking = Masking.of(rng.uniform(RandomStream.MASK_ORDER, ids, size).argsort(dim=1, stable=True), counts)
        masking, ids = masking.to(latents.device), on_device(ids, latents.device)
        encoded = self.mar.encode(latents, masking.visible, masking.real)
        z = self.condition(prompts, encoded, masking, grid, seen)

        # Every hidden token `repeats` times: the same row of latents and condition, its own step and noise.
        repeat = torch.arange(repeats, device=ids.device)[:, None]
        numbers = ((ids[masking.hidden // size] * repeats + repeat) * size + masking.hidden % size).flatten()
        rows = masking.hidden.repeat(repeats)
        t = (rng.uniform(RandomStream.TIMESTEP, numbers)[:, 0] * modules.STEPS).long()
        noise = rng.noise(RandomStream.NOISE, numbers)
        x0, table = latents.flatten(0, 2), diffusion_schedule(modules.STEPS, device=latents.device)
        x_t = diffusion_add_noise(x0, t, noise, table, rows=rows)
        out = self.mar.diffloss.net(x_t, t, z.flatten(0, 1).index_select(0, masking.hidden))
        total = diffusion_loss(out, x0, t, noise, table, rows=rows, reduction="sum")
        return LossTerm(total, torch.full_like(total.detach(), int(counts.sum()) * repeats))

    def answer_loss(self, batch: Batch, latents: Tensor) -> LossTerm:
        """Next-token cross-entropy of the answers; logits exist for labelled rows only."""
        encoded, buffers = self.mar.encode(latents), self.config.mar.buffers
        prompts = [self.conversation(tuple(turns)) for turns in batch.text]
        layout = prompt.layout(prompts, buffers, encoded.shape[1] - buffers)
        labelled = int((layout.labels != IGNORE).sum())  # on the host, so that no GPU is waited for
        layout = layout.to(encoded.device)
        hidden = self.states(layout, self.understood(encoded))
        labels, head = layout.labels.flatten(), self.llm.lm_head.weight
        total = masked_linear_cross_entropy(hidden.flatten(0, 1), head, labels, reduction="sum", max_labelled=labelled)
        return LossTerm(total, torch.full_like(total.detach(), labelled))

    def hidden_counts(self, rng: CounterRNG, sample_ids: Tensor, size: int) -> Tensor:
        """How many tokens of each image are hidden, int64 [B]."""
        uniform = rng.uniform(RandomStream.MASK_RATE, sample_ids)[:, 0]
        if self.config.parity:
            uniform = uniform[:1].expand_as(uniform)
        return hidden_counts(uniform, size, self.config.mar.mask_ratio_min)

    def prompts(self, batch: Batch, rng: CounterRNG) -> list[Prompt]:
        """A template or caption per sample, some of them dropped; h_v stays."""
        make = prompt.template if batch.task == "reca" else prompt.caption
        drop = rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < self.config.text_drop
        texts = zip(batch.text, drop.tolist(), strict=True)
        return [make(self.tokenizer, None if dropped else text) for text, dropped in texts]

    @contextlib.contextmanager
    def _dropout(self, batch: Batch, rng: CounterRNG) -> Iterator[None]:
        """Dropout from torch's generator, seeded by the first sample, and the generator as before afterwards.

        Attention drops probabilities inside its kernel, so these rng cannot be addressed by sample. Seeded so, a
        micro-batch drops the same whenever and after whatever it runs; another micro_batch drops otherwise.
        """
        if not (self.training and self.config.mar.dropout):
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(rng.fold_in(int(batch.host_ids[0])).seed)
            yield

    # inference

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int = 64,
        guidance: float = 3.0,
        guidance_schedule: str = "constant",
        diffusion_steps: int = 100,
        temperature: float = 1.0,
        clip_sample_range: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 32,
    ) -> list[Tensor]:
        """Images by MAR (`sampling.draw_latents`), `batch` at a time. Seeds lie in [0, 2**56)."""
        check_pairs(prompts=prompts, seeds=seeds)
        side, factor = self.config.image_size, modules.factor(self.config)
        height, width = height or side, width or side
        check_multiple(factor, height, width)
        warn_of_cut([prompt.whole_caption(self.tokenizer, text) for text in prompts], prompt.MAX_TEXT)
        images = []
        with self._evaluating():
            for i in range(0, len(prompts), batch):
                cond = [prompt.caption(self.tokenizer, text) for text in prompts[i : i + batch]]
                latents = sampling.draw_latents(
                    self,
                    cond,
                    [prompt.caption(self.tokenizer, None)] * len(cond),
                    sampling.Chance(torch.tensor(seeds[i : i + batch], device=self.device)),
                    (height // factor, width // factor),
                    steps=steps,
                    guidance=guidance,
                    guidance_schedule=guidance_schedule,
                    diffusion=diffusion_steps,
                    temperature=temperature,
                    clip_sample_range=clip_sample_range,
                )
                images += list((127.5 * self.pixels(latents) + 128).clamp(0, 255).to(torch.uint8))
        return images

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        """Questions of the same length share a batch, up to 32 of them, so that no row is padding."""
        check_pairs(images=images, questions=questions)
        asked = [prompt.question(self.tokenizer, text) for text in questions]
        end, replies = control(self.tokenizer, prompt.END), [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
        groups = [list(group) for _, group in itertools.groupby(order, lambda i: len(asked[i].ids))]
        with self._evaluating():
            for numbers in (group[i : i + 32] for group in groups for i in range(0, len(group), 32)):
                embeddings = self.ask([images[i] for i in numbers], [asked[i] for i in numbers])
                tokens = sampling.greedy(self, embeddings, max_new_tokens, end)
                for i, row in zip(numbers, tokens.tolist(), strict=True):
                    row = row[: row.index(end)] if end in row else row
                    replies[i] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return replies

    @torch.no_grad()
    def ask(self, images: list[Tensor], asked: list[Prompt]) -> Tensor:  # uint8 [3, H, W] each
        """Input embeddings of questions about images, [B, L, H]."""
        view = self.views("i2t").und
        und = [make_view(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), view) for image in images]
        encoded = self.mar.encode(self.latents(to_unit(und).to(self.device)))
        buffers = self.config.mar.buffers
        layout = prompt.layout(asked, buffers, encoded.shape[1] - buffers).to(self.device)
        return template_concat(self.llm.model.embed_tokens.weight, self.understood(encoded), layout.src)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout, whatever mode the model is in."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    # the driver's questions about parameters

    def export(self, folder: Path) -> list[str]:
        """harmon.pth, which Harmon's code loads as it loads harmon_1.5b.pth.

        A codec and a tokenizer that exist nowhere else (random, or fitted here) go beside it.
        """
        return loading.export(self, folder)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.endswith(".bias") and ".diffloss." not in name

    def blocks(self) -> list[nn.Module]:
        mar = self.mar
        return [*self.llm.model.layers, *mar.encoder_blocks, *mar.decoder_blocks, *mar.diffloss.net.res_blocks]

    def config_warnings(self) -> list[str]:
        if self.understanding_size <= self.config.image_size:
            return []
        return [
            f"h_v is made of {self.understanding_size} pixels, more than the {self.config.image_size} to be drawn; the "
            "authors advise the lowest resolution that the model understands (model.understanding_size)"
        ]


def _role(name: str) -> str:
    part, rest = name.split(".", 1)
    if part == "llm":
        return "embed" if rest.startswith(("lm_head.", "model.embed_tokens.")) else "shared_lm"
    if part == "mar":
        return "shared_encoder" if rest.startswith(("encoder_", "z_proj", "fake_latent")) else "gen_head"
    return "codec" if part == "vae" else "bridge"
