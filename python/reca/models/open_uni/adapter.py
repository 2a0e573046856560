"""OpenUni as an Adapter: InternVL3 is frozen, the queries, connector, projector and SANA learn."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.files import read_json
from reca.models.base import Adapter, LossTerm, in_fp32
from reca.models.common.hub import TOKENIZER, fetch
from reca.models.common.images import per_channel, to_unit
from reca.models.common.inference import check_pairs, warn_of_cut
from reca.models.common.planned import greedy
from reca.models.common.text import check_tokenizer, control, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta, read_tensors, weight_file
from reca.models.open_uni import convert, modules, prompt, sampling
from reca.models.open_uni.config import OpenUniConfig
from reca.models.open_uni.prompt import IGNORE, Prompt
from reca.rng import CounterRNG, RandomStream
from reca_kernels import (
    AttentionSpan,
    attention_plan,
    flow_matching_add_noise,
    flow_matching_loss,
    masked_linear_cross_entropy,
    template_concat,
)
from reca_kernels.host import on_device

log = logging.getLogger("reca")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = 1000
CAPTION_DROP = 0.1
# what there is to download of InternVL3, and of a repository in diffusers' layout that is one part alone
MLLM = ["*.json", "*.safetensors", "*.txt"]
DIFFUSERS = ["config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*"]


class OpenUni(Adapter):
    name = "open_uni"
    tasks = frozenset({"reca", "t2i", "i2t"})
    abilities = frozenset({"generate", "edit", "answer"})
    trainable_roles = frozenset({"bridge", "gen_head"})
    condition_keys = ("h_v",)

    @in_fp32
    def __init__(self, config: OpenUniConfig, tokenizer):
        super().__init__()
        modules.check_sizes(config)
        self.config, self.tokenizer = config, tokenizer
        self.mllm = modules.mllm(config, control(tokenizer, prompt.CONTEXT))
        self.connector = modules.connector(config)
        self.projector = nn.Linear(config.language.hidden_size, config.sana.caption_channels)
        self.meta_queries = nn.Parameter(torch.randn(config.queries, config.language.hidden_size) * 0.02)
        self.transformer = modules.transformer(config)
        self.vae = modules.codec(config)

    @classmethod
    def load(cls, config: OpenUniConfig, device: torch.device | str = "cpu") -> "OpenUni":
        parts = {"weights": config.weights, "mllm": config.mllm, "dit": config.dit, "vae": config.vae}
        absent = [name for name, source in parts.items() if source is None]
        if absent == ["mllm", "dit", "vae"] and (frozen := convert.frozen_beside(config.weights)):
            with init_on_meta():
                model = cls(config, _tokenizer(config))
            trained, _ = convert.overlay([Path(source) for source in (config.weights, config.overlay) if source])
            assign_state_dict(model, read_tensors(frozen) | trained, str(frozen.parent), torch.float32)
            return model.to(device)
        if absent and len(absent) < len(parts):
            raise ValueError(f"model.{absent[0]} is null but other parts are given; OpenUni needs {', '.join(parts)}")
        if absent:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(config.seed)
                return cls(config, _tokenizer(config)).requires_grad_(True)
        if config.codec != "dc_ae":
            raise ValueError("model.codec=patches is for a random model; published parts go with model.codec=dc_ae")
        with init_on_meta():
            model = cls(config, _tokenizer(config))
        folder = fetch(config.mllm, MLLM, "model.mllm")
        assign_state_dict(model.mllm, convert.mllm_native(_tensors(folder)), str(folder))
        for part, class_, key in (("transformer", SanaTransformer2DModel, "dit"), ("vae", AutoencoderDC, "vae")):
            wanted = [*DIFFUSERS, *(f"{part}/{name}" for name in DIFFUSERS)]
            folder = fetch(getattr(config, key), wanted, f"model.{key}")
            setattr(model, part, _published(class_, folder / part if (folder / part).is_dir() else folder))
        state, report = convert.overlay(
            [fetch(s, key=f"model.{key}") for key in ("weights", "overlay") if (s := getattr(config, key))]
        )
        for line in report:
            log.info("OpenUni: %s", line)
        model.put_trained(state, config.weights)
        return model.to(device)

    @classmethod
    def build_meta(cls, config: OpenUniConfig) -> "OpenUni":
        """In fp32. `load` keeps InternVL3 in the type of its files, so published in bf16 it takes half."""
        return cls(config, _tokenizer(replace(config, tokenizer=None, mllm=None))).requires_grad_(True)

    def sequence(self) -> dict[str, int]:
        latents = (self.config.image_size // modules.factor(self.config)) ** 2
        return {"h_v": modules.hv_tokens(self.config), "queries": self.config.queries, "image": latents}

    def put_trained(self, state: dict[str, Tensor], source: str) -> None:
        """Overlay the parts a published file holds, in fp32; SANA stays as it is when the file has none of it."""
        queries = state["meta_queries"]
        if queries.shape != self.meta_queries.shape:
            raise ValueError(
                f"{source}: meta_queries is {list(queries.shape)}, expected {list(self.meta_queries.shape)}"
            )
        self.meta_queries = nn.Parameter(queries.float())
        for part in ("connector", "projector", "transformer"):
            own = {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
            if own:
                assign_state_dict(getattr(self, part), own, f"{source} ({part})", torch.float32)

    def views(self, task: str) -> Views:
        if task == "i2t":
            return Views(gen=None, und=View(self.config.understanding_size))
        gen = View(self.config.image_size, fit="random_crop")
        blurred = task == "reca" and self.config.hv_blur > 1
        return Views(gen=gen, und=replace(gen, blur=self.config.hv_blur) if blurred else None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        """latents [B, C, h, w] of gen; h_v [B, n, H] of und (i2t, and reca with a blur) or of gen (reca)."""
        if batch.task == "i2t":
            return {"h_v": self.understand(to_unit(batch.und))}
        pixels = to_unit(batch.gen)
        features = {"latents": self.latents(pixels)}
        if batch.task == "reca":
            features["h_v"] = self.understand(to_unit(batch.und) if batch.und else pixels)
        return features

    @torch.no_grad()
    def understand(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """h_v, [B, n, H]."""
        return self.mllm.model.get_image_features(
            self.vit_pixels(pixels), vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output

    def vit_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised first, resized then, as the release does."""
        mean, std = (per_channel(v, pixels) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return F.interpolate(
            ((pixels + 1) / 2 - mean) / std, size=[self.config.understanding_size] * 2, mode="bilinear"
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        with torch.autocast(pixels.device.type, enabled=False):
            if self.config.codec == "patches":
                return self.vae.encode(pixels.float())
            return self.vae.encode(pixels.float()).latent * self.vae.config.scaling_factor

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:  # [B, C, h, w]
        """About [-1, 1], [B, 3, H, W]."""
        if self.config.codec == "patches":
            return self.vae.decode(latents)
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def condition(self, prompts: list[Prompt], h_v: Tensor | None, side: str) -> Tensor:
        """Text condition of SANA, [B, queries, caption_channels].

        The queries come last under a causal mask, so no prompt row depends on a trained parameter: the prompt runs
        once without a graph, keeping its K/V, and only the query rows have one. This is exact.
        """
        layout, mask = prompt.plan(prompts, modules.hv_tokens(self.config), side)
        device, n, queries = self.meta_queries.device, mask.shape[1], AttentionSpan(self.config.queries)
        seen = attention_plan(prompt.runs(mask, side), device=device)
        behind = attention_plan([(*sample, queries) for sample in prompt.runs(mask, side, cached=True)], device=device)
        positions = on_device(prompt.positions(prompt.extend(mask, self.config.queries)), device)
        cache, model = DynamicCache(config=self.mllm.config.text_config), self.mllm.model.language_model
        with torch.no_grad():
            model(
                inputs_embeds=self.embed(layout.src, h_v),
                position_ids=positions[:, :n],
                plan=seen,
                past_key_values=cache,
                use_cache=True,
            )
        hidden = model(
            inputs_embeds=self.meta_queries.expand(len(prompts), -1, -1),
            position_ids=positions[:, n:],
            plan=behind,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.projector(self.connector(inputs_embeds=hidden).last_hidden_state)

    def embed(self, src: Tensor, h_v: Tensor | None) -> Tensor:
        """Prompt embeddings [B, L, H] from token ids and h_v."""
        table = self.mllm.get_input_embeddings().weight
        visual = table.new_empty(0, table.shape[1]) if h_v is None else h_v.to(table.dtype).flatten(0, -2)
        with torch.no_grad():
            return template_concat(table, visual, on_device(src, table.device))

    def weight(self, batch: Batch, rng: CounterRNG) -> Tensor:
        device = batch.sample_ids.device
        if batch.task != "i2t":
            return torch.full((), len(batch), dtype=torch.float32, device=device)
        counts = [sum(label != IGNORE for label in self.conversation(turns).labels) for turns in batch.text]
        return torch.full((), sum(counts), dtype=torch.float32, device=device)

    def loss(self, batch: Batch, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        if batch.task == "i2t":
            return self.answer_loss(batch, features["h_v"])
        h_v = features["h_v"] if batch.task == "reca" else None
        cond = self.condition(self.prompts(batch, rng), h_v, "left" if batch.task == "reca" else "right")
        rows = self.flow_loss(cond, features["latents"], batch.sample_ids, rng)
        return LossTerm(rows.sum(), self.weight(batch, rng))

    def flow_loss(self, cond: Tensor, latents: Tensor, sample_ids: Tensor, rng: CounterRNG) -> Tensor:
        """Mean squared error of the velocity per sample, fp32 [B]."""
        t, noise = self.sigma(rng, sample_ids), rng.noise(RandomStream.NOISE, sample_ids)
        noisy = flow_matching_add_noise(latents, t.to(torch.bfloat16).float() if self.config.parity else t, noise)
        velocity = self.transformer(noisy, encoder_hidden_states=cond, timestep=t * STEPS, return_dict=False)[0]
        return flow_matching_loss(velocity, latents, t, noise, reduction="sample")

    def prompts(self, batch: Batch, rng: CounterRNG) -> list[Prompt]:
        """A prompt per sample; a caption is dropped, a template never."""
        if batch.task == "reca":
            frame = len(prompt.with_image(self.tokenizer, "", 0).ids)
            room = prompt.MAX_LENGTH - modules.hv_tokens(self.config) - frame
            return [prompt.with_image(self.tokenizer, text, room) for text in batch.text]
        drop = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < CAPTION_DROP).tolist()
        texts = [None if out else text for text, out in zip(batch.text, drop, strict=True)]
        return [_cut(prompt.caption(self.tokenizer, text)) for text in texts]

    @staticmethod
    def sigma(rng: CounterRNG, sample_ids: Tensor) -> Tensor:
        """Noise level per sample, fp32 [B]: uniform over 1/1000 ... 1, without the schedule's inference shift."""
        index = (rng.uniform(RandomStream.TIMESTEP, sample_ids)[:, 0] * STEPS).floor()
        return (STEPS - index) / STEPS

    def conversation(self, turns: list) -> Prompt:
        return prompt.conversation(self.tokenizer, turns)

    def answer_loss(self, batch: Batch, h_v: Tensor) -> LossTerm:
        """Next-token cross-entropy of the answers; logits exist for labelled rows only."""
        talks = [self.conversation(turns) for turns in batch.text]
        layout, mask = prompt.plan(talks, modules.hv_tokens(self.config), "right")
        labelled = int((layout.labels != IGNORE).sum())  # on the host, so that no GPU is waited for
        hidden = self.mllm.model.language_model(
            inputs_embeds=self.embed(layout.src, h_v),
            position_ids=on_device(prompt.positions(mask), h_v.device),
            plan=attention_plan(prompt.runs(mask, "right"), device=h_v.device),
        ).last_hidden_state
        targets = on_device(layout.labels[:, 1:], h_v.device)
        total = masked_linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1),
            self.mllm.lm_head.weight,
            targets.flatten(),
            reduction="sum",
            max_labelled=labelled,
        )
        return LossTerm(total, torch.full_like(total.detach(), labelled))

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int = 20,
        guidance: float = 4.5,
        height: int | None = None,
        width: int | None = None,
        batch: int = 16,
    ) -> list[Tensor]:
        """Images by DPM-Solver++ (`sampling.sample`), `batch` at a time. Seeds lie in [0, 2**56)."""
        check_pairs(prompts=prompts, seeds=seeds)
        whole = [prompt.caption(self.tokenizer, text) for text in prompts]
        warn_of_cut([asked.ids for asked in whole], prompt.MAX_TEXT)
        cond = [_cut(asked) for asked in whole]
        uncond, images = [prompt.caption(self.tokenizer, None)], []
        for i in range(0, len(prompts), batch):
            texts, own = cond[i : i + batch], seeds[i : i + batch]
            images += sampling.sample(
                self, texts, uncond * len(texts), None, own, steps=steps, guidance=guidance, height=height, width=width
            )
        return images

    def edit(
        self,
        images: list[Tensor],
        instructions: list[str],
        seeds: list[int],
        *,
        steps: int = 20,
        guidance: float = 4.5,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Tensor]:
        """Both branches of the guidance see the image; the one without the instruction is told to keep it."""
        check_pairs(images=images, instructions=instructions, seeds=seeds)
        cond = [prompt.with_image(self.tokenizer, text) for text in instructions]
        uncond = [prompt.with_image(self.tokenizer, prompt.KEEP)] * len(instructions)
        h_v = torch.cat([self.understand(self._fit(image)) for image in images])
        return sampling.sample(
            self, cond, uncond, h_v, seeds, steps=steps, guidance=guidance, height=height, width=width
        )

    @torch.no_grad()
    def answer(
        self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100, batch: int = 64
    ) -> list[str]:
        check_pairs(images=images, questions=questions)
        asked, replies = [prompt.question(self.tokenizer, text) for text in questions], []
        end = control(self.tokenizer, prompt.END)
        for i in range(0, len(images), batch):
            layout, mask = prompt.plan(asked[i : i + batch], modules.hv_tokens(self.config), "left")
            h_v = self.understand(torch.cat([self._fit(image) for image in images[i : i + batch]]))
            tokens = greedy(
                self.mllm.model.language_model,
                self.mllm.lm_head,
                self.embed(layout.src, h_v),
                prompt.positions(mask).to(self.meta_queries.device),
                prompt.runs(mask, "left"),
                max_new_tokens,
                end,
            )
            for row in tokens.tolist():
                row = row[: row.index(end)] if end in row else row
                replies.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return replies

    def export(self, folder: Path) -> list[str]:
        """open_uni.pth: the trained parts, to be laid over InternVL3, SANA and DC-AE by OpenUni's loader.

        InternVL3 and a codec that exist nowhere else (random, or fitted here) go into a file beside it.
        """
        return convert.save(self.state_dict(), folder, frozen_too=self.config.mllm is None)

    def roles(self) -> dict[str, str]:
        return {name: _role(name) for name, _ in self.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        return [*self.connector.layers, *self.transformer.transformer_blocks]

    def _fit(self, image: Tensor) -> Tensor:  # uint8 [3, H, W]
        """An input image at inference, squashed to the training size, [1, 3, S, S] in [-1, 1]."""
        size = [self.config.image_size] * 2
        pixels = F.interpolate(image[None].float(), size=size, mode="bicubic", antialias=True).clamp(0, 255).round()
        return pixels.to(self.meta_queries.device) / 127.5 - 1


def _role(name: str) -> str:
    if name.startswith("mllm.model.vision_tower") or name.startswith("mllm.model.multi_modal_projector"):
        return "und_encoder"
    if name.startswith(("mllm.lm_head", "mllm.model.language_model.embed_tokens")):
        return "embed"
    if name.startswith("mllm."):
        return "und_lm"
    if name.startswith("transformer."):
        return "gen_head"
    return "codec" if name.startswith("vae.") else "bridge"


def _cut(asked: Prompt) -> Prompt:
    """A text-to-image prompt cut to what the release keeps."""
    return asked._replace(ids=asked.ids[: prompt.MAX_TEXT])


def _tokenizer(config: OpenUniConfig) -> PreTrainedTokenizerBase:
    if config.tokenizer:
        tokenizer = read_tokenizer(fetch(config.tokenizer, TOKENIZER, "model.tokenizer"))
    elif config.mllm:
        tokenizer = read_tokenizer(fetch(config.mllm, MLLM, "model.mllm"))
    else:
        tokenizer = word_tokenizer(config.words, prompt.SPECIAL_TOKENS)
    check_tokenizer(tokenizer, prompt.SPECIAL_TOKENS, config.language.vocab_size, "OpenUni")
    return tokenizer


def _tensors(source: Path) -> dict[str, Tensor]:
    return read_tensors(weight_file(source) if source.is_dir() else source)


@in_fp32
def _published(class_: type, folder: Path) -> nn.Module:
    """A model of diffusers from its folder, in fp32. The sizes are those of its config.json."""
    with init_on_meta():
        module = class_.from_config(read_json(folder / "config.json"))
    assign_state_dict(module, _tensors(folder), str(folder), torch.float32)
    return module
