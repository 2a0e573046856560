"""A tiny OpenUni that understands more than it can generate.

First the multimodal language model (InternVL3 architecture) learns to caption images and text: all pairs on `shapes`;
on `emoji`, where a frozen EfficientNet replaces InternViT, the pairs that captions name. Then it is frozen, as in
OpenUni, and queries, connector and SANA learn to generate from captions without the held-out pairs.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.demo.pretrain import ALIGNED_H_V, LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.codebook import fit_codebook
from reca.demo.pretrain.frozen_encoder import encode_once
from reca.demo.pretrain.language import PROMPTS, draw_reply
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, first_images, matrices, optimize, unit
from reca.models.common.patch_codebook import PatchCodebook
from reca.models.common.text import control, encode
from reca.models.open_uni import Adapter, modules, prompt
from reca.models.open_uni.loss import flow_loss, sample_prompts
from reca.rng import CounterRNG
from reca.toy_datasets.captions import TEMPLATES, caption, phrase
from reca.toy_datasets.dataset import load_dataset
from reca.toy_datasets.split import Split
from reca_kernels import IGNORE_INDEX, attention_plan, masked_linear_cross_entropy, template_concat

STEPS = {"shapes": (350, 600), "emoji": (350, 900)}  # (understanding, generation)
CODEC_SHARE = {"shapes": 0.25, "emoji": 1.0}  # fraction of the codec split that the codec is fitted to
# Noise on the hidden states that replies are predicted from, relative to their RMS. It separates the states of
# different words, which the generator reads, too: without it one pre-trained model named red and blue correctly but
# confused them in images.
NOISE = {"shapes": 0.0, "emoji": 1.0}
HV = Callable[[Tensor], Tensor]  # indices of the understood images -> h_v, with gradient


def pretrain(dataset: str, recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model).train()
    torch.nn.init.normal_(model.mllm.get_input_embeddings().weight, std=0.5)
    toy_dataset = load_dataset(dataset)
    understood, captioned = toy_dataset.splits["understood"](seed), toy_dataset.splits["captioned"](seed)
    every_thing = first_images(toy_dataset.splits[toy_dataset.codec_split](seed), min(scale, CODEC_SHARE[dataset]))
    if isinstance(model.codec, PatchCodebook):
        fit_codebook(model.codec, every_thing)
    else:
        model.codec.fit(unit(every_thing))
    understanding, generation = (scaled(steps, scale) for steps in STEPS[dataset])

    images = first_images(understood, scale)
    if model.config.understanding == "efficientnet":
        h_v, tower = _frozen_h_v(model, images, every_thing), []
    else:
        h_v, tower = partial(_trained_h_v, model, images), [model.mllm.model.vision_tower.encoder]
    caption_loss = _caption_loss(model, understood, len(images), h_v, rng, NOISE[dataset])
    layers = (*tower, model.mllm.model.language_model.layers)
    trained = [p for p in model.mllm.parameters() if p.requires_grad]
    optimize(trained, matrices(*layers), caption_loss, understanding, progress)
    model.mllm.requires_grad_(False)

    trained = [p for name, p in model.named_parameters() if not name.startswith(("mllm.", "codec."))]
    layers = (model.connector.layers, model.transformer.transformer_blocks)
    generation_loss = _generation_loss(model, captioned, seed, rng, scale)
    optimize(trained, matrices(*layers), generation_loss, generation, progress, done=understanding)
    model.export(folder)
    return model


class _Slots:
    """Captions as token ids in place of h_v."""

    def __init__(self, model: Adapter):
        self.model, self.count = model, modules.hv_tokens(model.config)
        self.end = control(model.tokenizer, prompt.END)

    def ids(self, text: str) -> list[int]:
        return encode(self.model.tokenizer, text)

    def words(self, text: str) -> list[int]:
        return pad_tokens(self.ids(text), self.count, self.end)

    def with_words(self, given: prompt.Prompt, words: list[int]) -> prompt.Prompt:
        """Replace a prompt's image by words."""
        return prompt.Prompt(given.ids[: given.slot] + words + given.ids[given.slot :])


def _caption_loss(
    model: Adapter, split: Split, count: int, h_v: HV, rng: random.Random, noise: float
) -> Callable[[int], Tensor]:
    """Return the loss of an understanding step: captioning of images, words and text prompts, and alignment of h_v.

    count: number of the split's images to use. noise: see NOISE.
    """
    slots = _Slots(model)
    words = [slots.words(caption(split.scene(i))) for i in range(count)]

    def with_reply(given: prompt.Prompt, scene) -> prompt.Prompt:
        """Append a reply to a prompt."""
        ids, labels = draw_reply(scene, rng, slots.ids)
        return prompt.Prompt(
            [*given.ids, *ids, slots.end], given.slot, [*[IGNORE_INDEX] * len(given.ids), *labels, slots.end]
        )

    def loss(step: int) -> Tensor:
        index = torch.randint(count, (CAPTION_BATCH,))
        given, rows = h_v(index), []
        for k, i in enumerate(index.tolist()):
            scene = split.scene(i)
            rows.append(with_reply(prompt.question(model.tokenizer, rng.choice(PROMPTS)), scene))
            with_words = slots.with_words(prompt.question(model.tokenizer, rng.choice(PROMPTS)), words[i])
            text_prompt = prompt.caption(model.tokenizer, phrase(caption(scene), rng))
            text_prompt = text_prompt._replace(ids=text_prompt.ids[:-1])  # without the token that opens an image
            rows.append(with_reply(with_words if k < CAPTION_BATCH // 2 else text_prompt, scene))
        table = model.mllm.get_input_embeddings().weight
        on_slots = torch.tensor([words[i] for i in index.tolist()])
        return answer_loss(model, rows, given, noise) + alignment(given, on_slots, table)

    return loss


def _trained_h_v(model: Adapter, images: Tensor, index: Tensor) -> Tensor:
    return encode_h_v(model, unit(images[index]))


def _frozen_h_v(model: Adapter, images: Tensor, every_thing: Tensor) -> HV:
    """Encode images once with the frozen EfficientNet. The projector after it stays trainable."""
    encoder, project = model.mllm.model.vision_tower, model.mllm.model.multi_modal_projector
    encoder.requires_grad_(False)
    features = encode_once(model.config, encoder, project, images, every_thing)
    return lambda index: project(features[index])


def encode_h_v(model: Adapter, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    """Compute h_v with gradient, unlike the adapter."""
    return model.mllm.model.get_image_features(
        model.vit_pixels(pixels), vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def answer_loss(model: Adapter, rows: list[prompt.Prompt], h_v: Tensor, noise: float) -> Tensor:
    """Compute the mean cross-entropy of the labels, with gradient to embeddings and h_v. noise: see NOISE."""
    layout = prompt.layout(rows, modules.hv_tokens(model.config), "right")
    embeddings = template_concat(model.mllm.get_input_embeddings().weight, h_v.flatten(0, 1), layout.src)
    hidden = model.mllm.model.language_model(
        inputs_embeds=embeddings,
        position_ids=layout.positions,
        plan=attention_plan(layout.spans()),
    ).last_hidden_state
    if noise:
        size = hidden.detach().square().mean(-1, keepdim=True).sqrt()
        hidden = hidden + noise * size * torch.randn_like(hidden)
    return masked_linear_cross_entropy(
        hidden[:, :-1].flatten(0, 1), model.mllm.lm_head.weight, layout.labels[:, 1:].flatten(), reduction="mean"
    )


def _generation_loss(
    model: Adapter, split: Split, seed: int, rng: random.Random, scale: float
) -> Callable[[int], Tensor]:
    """Return the loss of a generation step: from text prompts, and from words in place of h_v."""
    slots, noise_rng = _Slots(model), CounterRNG(seed)
    latents = torch.cat([model.latents(unit(part)) for part in first_images(split, scale).split(500)])

    def loss(step: int) -> Tensor:
        index, sample_ids, phrases, texts = draw_batch(split, len(latents), step, rng)
        prompts = sample_prompts(model, Batch("t2i", sample_ids[: len(phrases)], phrases), noise_rng)
        with_image = [prompt.with_image(model.tokenizer, rng.choice(TEMPLATES)) for _ in texts]
        prompts += [slots.with_words(p, slots.words(text)) for p, text in zip(with_image, texts, strict=True)]
        condition = model.condition(prompt.layout(prompts, slots.count, "left", model.config.queries), None)
        return flow_loss(model, condition, latents[index], sample_ids, noise_rng).mean()

    return loss


FACTS_AT_ONCE = (
    'The language model can state any fact of a prompt directly ("second colour red"), from an image or from text. The '
    "queries of the generator need that; large language models can do it."
)


def _setup(dataset: str, **own: Any) -> DemoSetup:
    """Return the setup for a toy dataset, with the settings that all share."""
    return DemoSetup(
        steps=sum(STEPS[dataset]),
        pretrain=partial(pretrain, dataset),
        init_override="model.weights={folder}",
        sampling={"steps": 20, "guidance": 1.0},
        omitted_variants={
            "RECA with h_v from the generation side": (
                "OpenUni cannot read it, as its language model has one vision tower only"
            )
        },
        **own,
    )


SETUPS = {
    "shapes": _setup(
        "shapes",
        recipe="open_uni_tiny",
        description="An OpenUni of 0.6 million parameters",
        assumptions=(
            ALIGNED_H_V.format(parts="a vision tower and a language model"),
            FACTS_AT_ONCE,
            "Images are 20 pixels wide. Instead of DC-AE, latents are principal components of patches of four pixels, "
            "fitted to images of all pairs. All variants train the whole generation side, nothing else.",
            LINEAR_LATENTS,
        ),
    ),
    "emoji": _setup(
        "emoji",
        recipe="open_uni_emoji_tiny",
        description="An OpenUni of 1.5 million parameters, with an EfficientNet-Lite0 instead of InternViT,",
        assumptions=(
            ALIGNED_H_V.format(parts="a projector after EfficientNet and a language model")
            + " On this toy dataset it is trained on images of the pairs that captions name.",
            FACTS_AT_ONCE + " Noise on the hidden states that predict its replies separates words for the queries.",
            "Images are 64 pixels wide. Instead of DC-AE, latents are 16 random numbers assigned to each of 2048 "
            "patches of 16 pixels. Similar latents do not mean similar patches, so the generator cannot generalise to "
            "patches that it was not trained on. With latents linear in colour (principal components of patches) it "
            "combined colours and emoji without RECA, which left little to improve.",
        ),
        random_encoder=("model.efficientnet_weights=null",),
    ),
}
