"""A tiny BAGEL that understands more than it can generate.

First SigLIP and the understanding expert learn to caption all colour-shape pairs, from images and from text. Then they
are frozen, as in BAGEL, and the generation expert is trained on captions without the held-out pairs.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reca.config.recipe import Recipe
from reca.demo.pretrain import ALIGNED_H_V, LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.language import PROMPTS, draw_reply
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, first_images, optimize, save_as_run, unit
from reca.models.bagel import Adapter, modules, prompt
from reca.models.bagel.loss import flow_loss
from reca.models.common.images import fit_to_view
from reca.models.common.kl_codec import PatchMoments
from reca.models.common.text import encode
from reca.rng import CounterRNG
from reca.toy_datasets.captions import TEMPLATES, caption, phrase
from reca.toy_datasets.dataset import load_dataset
from reca.toy_datasets.split import Split
from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy

UNDERSTANDING_STEPS, GENERATION_STEPS = 350, 600


class _WordsAsHv(Adapter):
    """A BAGEL that takes h_v in the language model's space: outputs of the connector, or word embeddings."""

    def connect(self, h_v: Sequence[Tensor] | None) -> Tensor:
        table = self.language_model.model.embed_tokens.weight
        return torch.cat([rows.flatten(0, 1) for rows in h_v]) if h_v else table.new_empty(0, table.shape[1])


def pretrain(dataset: str, recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and save a run in `folder`."""
    torch.manual_seed(seed)
    rng, splits = random.Random(seed), load_dataset(dataset).splits
    understood, captioned = splits["understood"](seed), splits["captioned"](seed)
    recipe.model.seed = seed
    model = _WordsAsHv.load(recipe.model).train()
    assert isinstance(model.codec, PatchMoments), "the codec of toy datasets"
    model.codec.fit(unit(first_images(understood, min(scale, 0.25))))
    torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.5)
    roles = model.roles()

    def train(trained: Sequence[str], loss: Callable[[int], Tensor], steps: int, done: int = 0) -> None:
        """Train the parameters of some roles, and freeze them."""
        parameters = {name: p for name, p in model.named_parameters() if roles[name] in trained}
        muon = [p for name, p in parameters.items() if p.ndim == 2 and ".layers." in name]
        optimize(parameters.values(), muon, loss, steps, progress, done)
        for parameter in parameters.values():
            parameter.requires_grad_(False)

    understanding, generation = scaled(UNDERSTANDING_STEPS, scale), scaled(GENERATION_STEPS, scale)
    train(("und_encoder", "bridge", "und_lm", "embed"), _caption_loss(model, understood, rng, scale), understanding)
    train(("gen_lm", "gen_head"), _generation_loss(model, captioned, seed, rng, scale), generation, understanding)

    finished = Adapter.load(recipe.model)
    finished.load_state_dict(model.state_dict())
    save_as_run(finished, recipe, folder, understanding + generation)
    return finished


class _Slots:
    """Captions as token ids in place of h_v."""

    def __init__(self, model: Adapter):
        self.model, self.side = model, modules.vit_size(model.config.vision)
        self.item = prompt.VitImage(self.side, self.side)

    def ids(self, text: str) -> list[int]:
        return encode(self.model.tokenizer, text)

    def words(self, text: str) -> list[int]:
        return pad_tokens(self.ids(text), self.side**2, self.model.vocabulary.eos)

    def as_h_v(self, words: list[int]) -> Tensor:
        """Embed words in place of h_v, in the language model's space, [h, w, D]."""
        table = self.model.language_model.model.embed_tokens.weight
        return table[torch.tensor(words)].unflatten(0, (self.side, self.side))


def _caption_loss(model: Adapter, split: Split, rng: random.Random, scale: float) -> Callable[[int], Tensor]:
    """Return the loss of an understanding step: captioning of images, words and text prompts, and alignment of h_v."""
    slots, v = _Slots(model), model.vocabulary
    view = model.views("reca").und
    assert view is not None
    images = first_images(split, scale)
    pixels = unit(torch.stack([fit_to_view(image, view) for image in images]))
    words = [slots.words(caption(split.scene(i))) for i in range(len(images))]

    def conversation(question: str, scene) -> prompt.Text:
        opening, (ids, labels) = [v.bos, *slots.ids(question), v.eos, v.bos], draw_reply(scene, rng, slots.ids)
        after = [*[IGNORE_INDEX] * len(opening), *labels, v.eos, IGNORE_INDEX][1:]
        return prompt.Text([*opening, *ids, v.eos], after)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(images), (CAPTION_BATCH,))
        rows = model.connector(model.vit_model.vision_model(pixels[index]))
        samples: list[list[prompt.Item]] = []
        h_v = []
        for k, i in enumerate(index.tolist()):
            scene = split.scene(i)
            samples.append([slots.item, conversation(rng.choice(PROMPTS), scene)])
            h_v.append(rows[k])
            if k < CAPTION_BATCH // 2:
                samples.append([slots.item, conversation(rng.choice(PROMPTS), scene)])
                h_v.append(slots.as_h_v(words[i]))
            else:
                samples.append([conversation(phrase(caption(scene), rng), scene)])
        layout = model.layout(samples)
        hidden, _ = model.prefill(prompt.Prompt(samples, h_v), layout=layout)
        captioning = masked_linear_cross_entropy(hidden, model.language_model.lm_head.weight, layout.labels)
        on_slots = torch.tensor([words[i] for i in index.tolist()])
        return captioning + alignment(rows.flatten(1, 2), on_slots, model.language_model.model.embed_tokens.weight)

    return loss


def _generation_loss(
    model: Adapter, split: Split, seed: int, rng: random.Random, scale: float
) -> Callable[[int], Tensor]:
    """Return the loss of a generation step: from text prompts, and from words in place of h_v."""
    slots, noise_rng = _Slots(model), CounterRNG(seed)
    moments = torch.stack(model.moments(list(first_images(split, scale))))
    noisy_image = prompt.NoisyImage(*(size // model.config.latent_patch_size for size in moments.shape[2:]))

    def loss(step: int) -> Tensor:
        index, sample_ids, phrases, texts = draw_batch(split, len(moments), step, rng)
        text_prompts: list[list[prompt.Item]] = [[model.text(words)] for words in phrases]
        h_v_prompts: list[list[prompt.Item]] = [[slots.item, model.text(rng.choice(TEMPLATES))] for _ in texts]
        h_v = [slots.as_h_v(slots.words(text)) for text in texts]
        given = prompt.Prompt(text_prompts + h_v_prompts, h_v)
        layout = model.layout(given.items)
        image = model.layout([[noisy_image]] * len(index), layout.next_positions)
        total, _ = flow_loss(model, given, layout, image, moments[index], sample_ids, noise_rng)
        return total / (len(index) * noisy_image.height * noisy_image.width)

    return loss


SETUPS = {
    dataset: DemoSetup(
        recipe="bagel_tiny",
        steps=UNDERSTANDING_STEPS + GENERATION_STEPS,
        pretrain=partial(pretrain, dataset),
        init_override="train.init_from={folder}",
        sampling={"steps": 20, "guidance": 1.0},
        description="A BAGEL of 0.6 million parameters",
        assumptions=(
            ALIGNED_H_V.format(parts="SigLIP and the understanding expert"),
            'The understanding expert can state any fact of a prompt directly ("second colour red"), from an image or '
            "from text; large language models can.",
            "Images are 20 pixels wide. Instead of FLUX's autoencoder, latents are principal components of patches of "
            "four pixels, fitted to images of all pairs. All variants train the generation expert and its input and "
            "output layers, nothing else.",
            LINEAR_LATENTS,
        ),
        generation_variant=("RECA-vae", "h_v from the codec that encodes the target", ("model.hv_source=vae",)),
    )
    for dataset in ("shapes", "jitter")
}
