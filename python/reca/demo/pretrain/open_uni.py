"""A tiny OpenUni that understands more than it can generate.

First InternVL3's wiring learns to caption images, and text: every pair in the world of shapes; in that of emoji, where
a frozen EfficientNet stands in InternViT's place, the pairs that captions name. Then it is frozen, as in OpenUni, and
queries, connector and SANA learn to draw captions that lack the held-out pairs.
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
from reca.demo.captions import TEMPLATES, caption, phrase
from reca.demo.pretrain import ALIGNED_H_V, LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.codebook import fit_codebook
from reca.demo.pretrain.frozen_encoder import encode_once
from reca.demo.pretrain.language import PROMPTS, draw_reply
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, first_images, matrices, optimize, unit
from reca.demo.splits import Split
from reca.demo.world import load_world
from reca.models.common.patch_codebook import PatchCodebook
from reca.models.common.text import control, encode
from reca.models.open_uni import Adapter, modules, prompt
from reca.models.open_uni.loss import flow_loss, sample_prompts
from reca.rng import CounterRNG
from reca_kernels import IGNORE_INDEX, attention_plan, masked_linear_cross_entropy, template_concat

STEPS = {"shapes": (350, 600), "emoji": (350, 900)}  # of understanding, of generation
CODEC_SHARE = {"shapes": 0.25, "emoji": 1.0}  # of the images that the world's codec is fitted to
# On the states that a reply is read from, over their root mean square. It keeps those of different words apart: the
# generator reads them, too, and without noise one start that named red and blue rightly drew one for the other.
NOISE = {"shapes": 0.0, "emoji": 1.0}
HV = Callable[[Tensor], Tensor]  # places of images among the understood -> h_v, with a graph


def pretrain(world: str, recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model).train()
    torch.nn.init.normal_(model.mllm.get_input_embeddings().weight, std=0.5)
    of_world = load_world(world)
    understood, captioned = of_world.splits["understood"](seed), of_world.splits["captioned"](seed)
    every_thing = first_images(of_world.splits[of_world.codec_split](seed), min(scale, CODEC_SHARE[world]))
    if isinstance(model.codec, PatchCodebook):
        fit_codebook(model.codec, every_thing)
    else:
        model.codec.fit(unit(every_thing))
    understanding, generation = (scaled(steps, scale) for steps in STEPS[world])

    images = first_images(understood, scale)
    if model.config.understanding == "efficientnet":
        h_v, tower = _frozen_h_v(model, images, every_thing), []
    else:
        h_v, tower = partial(_trained_h_v, model, images), [model.mllm.model.vision_tower.encoder]
    caption_loss = _caption_loss(model, understood, len(images), h_v, rng, NOISE[world])
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
    """Captions as token ids in the place of h_v."""

    def __init__(self, model: Adapter):
        self.model, self.count = model, modules.hv_tokens(model.config)
        self.end = control(model.tokenizer, prompt.END)

    def ids(self, text: str) -> list[int]:
        return encode(self.model.tokenizer, text)

    def words(self, text: str) -> list[int]:
        return pad_tokens(self.ids(text), self.count, self.end)

    def with_words(self, given: prompt.Prompt, words: list[int]) -> prompt.Prompt:
        """Put words in the place of a prompt's image."""
        return prompt.Prompt(given.ids[: given.slot] + words + given.ids[given.slot :])


def _caption_loss(
    model: Adapter, split: Split, count: int, h_v: HV, rng: random.Random, noise: float
) -> Callable[[int], Tensor]:
    """Make the loss of an understanding step: caption images, and prompts that quote or ask for one; align h_v.

    count: of the split's images, which are used. noise: see NOISE.
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
    """Encode images once by EfficientNet; the projector behind it is trained."""
    encoder, project = model.mllm.model.vision_tower, model.mllm.model.multi_modal_projector
    encoder.requires_grad_(False)
    features = encode_once(model.config, encoder, project, images, every_thing)
    return lambda index: project(features[index])


def encode_h_v(model: Adapter, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    """Encode h_v with a graph, which the adapter itself does not need."""
    return model.mllm.model.get_image_features(
        model.vit_pixels(pixels), vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def answer_loss(model: Adapter, rows: list[prompt.Prompt], h_v: Tensor, noise: float) -> Tensor:
    """Compute the mean cross-entropy of the labels, with a graph to embeddings and h_v. noise: see NOISE."""
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
    """Make the loss of a generation step."""
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
    'The language model can say any fact of a prompt at once ("second colour red"), from an image or from text. The '
    "queries in front of the generator need that; large language models can."
)


def _setup(world: str, **own: Any) -> DemoSetup:
    """Make the setup of a world from what all of them share."""
    return DemoSetup(
        steps=sum(STEPS[world]),
        pretrain=partial(pretrain, world),
        init_override="model.weights={folder}",
        sampling={"steps": 20, "guidance": 1.0},
        omitted_arms={
            "RECA with h_v from the generation side": (
                "which OpenUni has no way to read: its language model sees one tower only"
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
            "Images are 20 pixels wide, and a latent is the principal components of a square of four, fitted to "
            "images of every pair, which stands in for DC-AE. Everything that generates is trained in every arm, "
            "nothing else.",
            LINEAR_LATENTS,
        ),
    ),
    "emoji": _setup(
        "emoji",
        recipe="open_uni_emoji_tiny",
        description="An OpenUni of 1.5 million parameters, with an EfficientNet-Lite0 in InternViT's place,",
        assumptions=(
            ALIGNED_H_V.format(parts="a projector behind EfficientNet and a language model")
            + " In this world it learns on images of the pairs that captions name.",
            FACTS_AT_ONCE + " Noise on the states that its replies are read from keeps words apart for the queries.",
            "Images are 64 pixels wide. A latent is 16 random numbers that stand for a piece of 16 pixels, one of "
            "2048; this stands in for DC-AE. What two latents have in common says nothing of their pieces, so nothing "
            "is drawn that was not trained. With latents that are linear in colour (principal components of pieces) "
            "the generator combined colours and emoji by itself, and little was left for RECA to do.",
        ),
        random_encoder=("model.efficientnet_weights=null",),
    ),
}
