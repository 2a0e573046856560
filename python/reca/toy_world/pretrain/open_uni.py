"""A tiny OpenUni that understands more than it can draw.

First InternVL3's wiring learns to name every colour-shape pair, from images and from text. Then it is frozen, as in
OpenUni, and queries, connector and SANA learn to draw captions that lack the held-out pairs.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reca.config import Recipe
from reca.data.batch import Batch
from reca.models.common.text import control, encode
from reca.models.open_uni import Adapter, modules, prompt
from reca.models.open_uni.loss import flow_loss, sample_prompts
from reca.rng import CounterRNG
from reca.toy_world.captions import TEMPLATES, caption, phrase
from reca.toy_world.pretrain import ALIGNED_H_V, LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.toy_world.pretrain.alignment import alignment, filled
from reca.toy_world.pretrain.language import ASKED, IGNORE, reply
from reca.toy_world.pretrain.optimize import first_images, matrices, optimize, save_as_run, unit
from reca.toy_world.splits import captioned, understood
from reca_kernels import attention_plan, masked_linear_cross_entropy, template_concat

UNDERSTANDING, DRAWING = 350, 600  # steps
NAMED, DRAWN = 32, 64  # images in a step of each
COLOUR_PROBABILITY = 0.8  # of a caption to name the colour of a thing


def pretrain(recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and save a run in `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model).train()
    torch.nn.init.normal_(model.mllm.get_input_embeddings().weight, std=0.5)
    model.codec.fit(unit(first_images(understood(seed), min(scale, 0.25))))
    understanding, drawing = scaled(UNDERSTANDING, scale), scaled(DRAWING, scale)

    layers = (model.mllm.model.vision_tower.encoder, model.mllm.model.language_model.layers)
    optimize(model.mllm.parameters(), matrices(*layers), _naming(model, seed, rng, scale), understanding, progress)
    model.mllm.requires_grad_(False)

    trained = [p for name, p in model.named_parameters() if not name.startswith(("mllm.", "codec."))]
    layers = (model.connector.layers, model.transformer.transformer_blocks)
    optimize(trained, matrices(*layers), _drawing(model, seed, rng, scale), drawing, progress, done=understanding)
    save_as_run(model, recipe, folder, understanding + drawing)
    return model


class _Slots:
    """Captions as token ids on the rows of h_v, and prompts that quote them there."""

    def __init__(self, model: Adapter):
        self.model, self.count = model, modules.hv_tokens(model.config)
        self.end = control(model.tokenizer, prompt.END)

    def ids(self, text: str) -> list[int]:
        return encode(self.model.tokenizer, text)

    def words(self, text: str) -> list[int]:
        return filled(self.ids(text), self.count, self.end)

    def quoted(self, asked: prompt.Prompt, words: list[int]) -> prompt.Prompt:
        """A prompt with an image, with words in the image's place."""
        return prompt.Prompt(asked.ids[: asked.slot] + words + asked.ids[asked.slot :])


def _naming(model: Adapter, seed: int, rng: random.Random, scale: float) -> Callable[[int], Tensor]:
    """Make the loss of an understanding step: caption images, and prompts that quote or ask for one; align h_v."""
    split, slots = understood(seed), _Slots(model)
    shown = first_images(split, scale)
    words = [slots.words(caption(split.scene(i))) for i in range(len(shown))]

    def said(heard: prompt.Prompt, scene) -> prompt.Prompt:
        """A prompt with a reply."""
        ids, labels = reply(scene, rng, slots.ids)
        return prompt.Prompt(
            [*heard.ids, *ids, slots.end], heard.slot, [*[IGNORE] * len(heard.ids), *labels, slots.end]
        )

    def loss(step: int) -> Tensor:
        index = torch.randint(len(shown), (NAMED,))
        h_v = see(model, unit(shown[index]))
        rows = []
        for k, i in enumerate(index.tolist()):
            scene = split.scene(i)
            rows.append(said(prompt.question(model.tokenizer, rng.choice(ASKED)), scene))
            quoted = slots.quoted(prompt.question(model.tokenizer, rng.choice(ASKED)), words[i])
            asked = prompt.caption(model.tokenizer, phrase(caption(scene), rng))
            asked = asked._replace(ids=asked.ids[:-1])  # without the token that opens an image
            rows.append(said(quoted if k < NAMED // 2 else asked, scene))
        table = model.mllm.get_input_embeddings().weight
        on_slots = torch.tensor([words[i] for i in index.tolist()])
        return answers(model, rows, h_v) + alignment(h_v, on_slots, table)

    return loss


def see(model: Adapter, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    """Encode h_v with a graph, which the adapter itself does not need."""
    return model.mllm.model.get_image_features(
        model.vit_pixels(pixels), vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def answers(model: Adapter, rows: list[prompt.Prompt], h_v: Tensor) -> Tensor:
    """Mean cross-entropy of the labels, with a graph to embeddings and h_v."""
    layout = prompt.layout(rows, modules.hv_tokens(model.config), "right")
    embeddings = template_concat(model.mllm.get_input_embeddings().weight, h_v.flatten(0, 1), layout.src)
    hidden = model.mllm.model.language_model(
        inputs_embeds=embeddings,
        position_ids=layout.positions,
        plan=attention_plan(layout.spans()),
    ).last_hidden_state
    return masked_linear_cross_entropy(
        hidden[:, :-1].flatten(0, 1), model.mllm.lm_head.weight, layout.labels[:, 1:].flatten(), reduction="mean"
    )


def _drawing(model: Adapter, seed: int, rng: random.Random, scale: float) -> Callable[[int], Tensor]:
    """Make the loss of a generation step: half the captions as text prompts, half quoted in h_v's place."""
    split, slots, draws, half = captioned(seed), _Slots(model), CounterRNG(seed), DRAWN // 2
    latents = torch.cat([model.latents(unit(part)) for part in first_images(split, scale).split(500)])

    def loss(step: int) -> Tensor:
        index = torch.randint(len(latents), (DRAWN,))
        numbers = torch.arange(step * DRAWN, (step + 1) * DRAWN)
        texts = [caption(split.scene(i), None, rng, COLOUR_PROBABILITY) for i in index.tolist()]
        asked = sample_prompts(model, Batch("t2i", numbers[:half], [phrase(text, rng) for text in texts[:half]]), draws)
        shown = [prompt.with_image(model.tokenizer, rng.choice(TEMPLATES)) for _ in texts[half:]]
        quoted = [slots.quoted(asked, slots.words(text)) for asked, text in zip(shown, texts[half:], strict=True)]
        condition = model.condition(prompt.layout(asked + quoted, slots.count, "left", model.config.queries), None)
        return flow_loss(model, condition, latents[index], numbers, draws).mean()

    return loss


SETUP = DemoSetup(
    recipe="open_uni_tiny",
    steps=UNDERSTANDING + DRAWING,
    pretrain=pretrain,
    init_override="train.init_from={folder}",
    sampling={"steps": 20, "guidance": 1.0},
    description="An OpenUni of 0.6 million parameters",
    assumptions=(
        ALIGNED_H_V.format(parts="a vision tower and a language model"),
        'The language model can say any fact of a prompt at once ("second colour red"), from an image or from text. '
        "The queries in front of the generator need that; large language models can.",
        "Images are 20 pixels wide, and a latent is the principal components of a square of four, fitted to "
        "images of every pair, which stands in for DC-AE. Everything that generates is trained in every arm, "
        "nothing else.",
        LINEAR_LATENTS,
    ),
    omitted_arms={
        "RECA with h_v from the generation side": (
            "which OpenUni has no way to read: its language model sees InternViT only"
        )
    },
)
