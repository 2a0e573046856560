"""A tiny Show-o that understands more than it can generate.

On `shapes` its understanding side, a CLIP tower, is trained on all pairs; on `emoji` it is a frozen EfficientNet, and
held-out pairs are never named. Captions lack these in both. In addition to Show-o's own losses, three terms provide
what large models already have: alignment of h_v with the words of a caption (slot by slot), answers about words in
place of h_v, and images generated from words in place of h_v.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.demo.pretrain import ALIGNED_JOINTLY, DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.codebook import CodebookTask
from reca.demo.pretrain.frozen_encoder import encode_once
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, first_images, matrices, optimize, unit
from reca.models.common.pooled_features import PooledProjector
from reca.models.show_o import Adapter, prompt
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.loss import i2t_samples, t2i_samples
from reca.models.show_o.masking import sample_mask
from reca.toy_datasets.captions import QUESTIONS, TEMPLATES, caption
from reca.toy_datasets.dataset import ToyDataset, load_dataset
from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy

STEPS = {"shapes": 800, "jitter": 800}
STEPS |= {"emoji": 500, "emoji-shared": 500, "emoji-shared-few": 500, "emoji-places": 1200, "emoji-varied": 2000}
SLOTS = (20, 36)  # range of prompt lengths when captions replace h_v


def pretrain(dataset: str, recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model)
    task = (_FrozenTowerTask if model.uses_efficientnet else _Task)(model, load_dataset(dataset), seed, scale)

    steps = scaled(STEPS[dataset], scale)
    layers = matrices(model.showo.model.layers, *([model.clip.encoder.layers] if model.uses_clip else []))
    optimize(model.parameters(), layers, lambda step: task.generation_loss(step) + task.caption_loss(), steps, progress)
    model.export(folder)
    return model


class _Task(CodebookTask):
    """Losses of one pre-training step."""

    def __init__(self, model: Adapter, dataset: ToyDataset, seed: int, scale: float):
        super().__init__(model, model.codec, dataset, seed, scale)
        self.tower = conditioner(model, "reca")
        captions = (caption(self.caption_split.scene(i)) for i in range(len(self.images)))
        self.words = torch.stack([self.slots(text) for text in captions])  # [n, slots]

    def slots(self, text: str) -> Tensor:
        """Tokenize a caption for the slots of h_v, padded with the end of text."""
        return torch.tensor(pad_tokens(self.model.tokens(text), self.tower.tokens(), self.model.vocabulary.eos))

    def generation_loss(self, step: int) -> Tensor:
        """Compute the generation loss, from text prompts and from words in place of h_v."""
        model, v = self.model, self.model.vocabulary
        index, ids, phrases, texts = draw_batch(self.generation_split, len(self.codes), step, self.rng)
        half = len(phrases)
        samples = t2i_samples(model, Batch("t2i", ids[:half], phrases), self.noise_rng)
        slots, templates = self.rng.randint(*SLOTS), [self.rng.choice(TEMPLATES) for _ in texts]
        tokens = [model.tokens(prompt.TEMPLATE.format(text)) for text in templates]
        samples += [prompt.reca_clip(t, v, slots, self.tower.tokens(), model.image_tokens) for t in tokens]
        layout = with_words(prompt.layout(samples, v), torch.stack([self.slots(text) for text in texts]))
        masked = sample_mask(self.noise_rng, ids, model.image_tokens)
        from_text, from_words = self.cross_entropies(prompt.apply_mask(layout, self.codes[index], masked, v), half)
        return 0.5 * from_text + 0.5 * from_words

    def caption_loss(self) -> Tensor:
        """Compute the losses of captioning images and words in place of h_v, and of aligning h_v with words."""
        model, index = self.model, torch.randint(len(self.images), (CAPTION_BATCH,))
        features, words = self.features(index), self.words[index]
        turns = [[Turn(self.rng.choice(QUESTIONS), caption(self.caption_split.scene(i)))] for i in index.tolist()]
        samples = i2t_samples(model, Batch("i2t", index, turns + turns[: CAPTION_BATCH // 2]), self.noise_rng)
        layout = with_words(
            prompt.layout(samples, model.vocabulary), words[: CAPTION_BATCH // 2], behind=CAPTION_BATCH * words.shape[1]
        )
        of_images, of_words = self.cross_entropies(layout, CAPTION_BATCH, features)
        table = model.showo.model.embed_tokens.weight[: model.vocabulary.offset]
        return of_images + of_words + alignment(model.visual(features), words, table)

    def features(self, index: Tensor) -> Tensor:
        """Encode images, with gradient."""
        return self.tower.encode_reca(unit(self.images[index]))

    def cross_entropies(self, layout: prompt.Layout, first: int, h_v: Tensor | None = None) -> list[Tensor]:
        """Compute the mean cross-entropy over labelled rows, for the `first` samples and for the others."""
        head, read = self.model.showo.lm_head, layout.labels != IGNORE_INDEX
        counts = [int(read[:first].sum()), int(read[first:].sum())]
        hidden = self.model.hidden(layout, h_v, read=read, read_rows=sum(counts))
        parts = zip(hidden.tensor_split([first]), layout.labels.tensor_split([first]), counts, strict=True)
        return [
            masked_linear_cross_entropy(
                rows.flatten(0, 1), head.weight, labels.flatten(), head.bias, reduction="sum", max_labelled=count
            )
            / count
            for rows, labels, count in parts
        ]


def with_words(layout: prompt.Layout, words: Tensor, behind: int = 0) -> prompt.Layout:  # int64 [B, n]
    """Replace tokens of h_v, except the first `behind`, by token ids."""
    row = -1 - layout.src.long() - behind
    return replace(layout, src=torch.where(row < 0, layout.src, words.flatten()[row.clamp(min=0)].int()))


class _FrozenTowerTask(_Task):
    """The same with a frozen tower: every image is encoded only once."""

    def __init__(self, model: Adapter, dataset: ToyDataset, seed: int, scale: float):
        super().__init__(model, dataset, seed, scale)
        every_thing = first_images(dataset.splits[dataset.codec_split](seed), scale)
        assert isinstance(model.mm_projector, PooledProjector)
        self.encoded = encode_once(model.config, model.efficientnet, model.mm_projector, self.images, every_thing)

    def features(self, index: Tensor) -> Tensor:
        return self.encoded[index]


SAMPLING = {"steps": 18, "guidance": 0.0, "temperature": 0.5}
SHAPES = {
    dataset: DemoSetup(
        recipe="show_o_tiny",
        steps=STEPS[dataset],
        pretrain=partial(pretrain, dataset),
        init_override="model.weights={folder}",
        sampling=SAMPLING,
        description="A Show-o of half a million parameters",
        assumptions=(
            ALIGNED_JOINTLY.format(how=""),
            "Images are 20 pixels wide. Instead of MAGVITv2, image tokens come from a codebook of pixel patches. Token "
            "embeddings and projector are frozen in all variants.",
        ),
        generation_variant=(
            "RECA-codebook",
            "h_v from the generation codebook",
            ("model.hv_source=vq", "model.hv_down_scale=1"),
        ),
    )
    for dataset in ("shapes", "jitter")
}


def _of_emoji(dataset: str, *overrides: str, codebook: str = "2048 patches of 16 pixels") -> DemoSetup:
    return DemoSetup(
        recipe="show_o_emoji_tiny",
        steps=STEPS[dataset],
        pretrain=partial(pretrain, dataset),
        init_override="model.weights={folder}",
        cached=True,
        sampling=SAMPLING,
        description="A Show-o of 0.9 million parameters, with an EfficientNet-Lite0 instead of CLIP,",
        assumptions=(
            ALIGNED_JOINTLY.format(how=", on images of the pairs that captions name"),
            f"Images are 64 pixels wide. Instead of MAGVITv2, image tokens come from a codebook of {codebook}. Token "
            "embeddings, projector and attention are frozen in all variants, and all use the learning rate that "
            "was chosen by RECA's results on another seed; there was no separate search for SFT.",
        ),
        random_encoder=("model.efficientnet_weights=null",),
        overrides=overrides,
    )


def _of_shared_codes(dataset: str) -> DemoSetup:
    overrides = "model.patches.size=8", "model.patches.entries=1024"
    return _of_emoji(dataset, *overrides, codebook="1024 patches of eight pixels")


SETUPS = SHAPES | {
    "emoji": _of_emoji("emoji"),
    "emoji-shared": _of_shared_codes("emoji-shared"),
    "emoji-shared-few": _of_shared_codes("emoji-shared-few"),
    "emoji-places": _of_emoji("emoji-places"),
    "emoji-varied": _of_emoji("emoji-varied", "model.patches.entries=6144", codebook="6144 patches of 16 pixels"),
}
