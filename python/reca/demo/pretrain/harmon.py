"""A tiny Harmon that understands more than it can generate.

A MAR encoder and a language model are shared by understanding and generation. They first learn to caption images of all
pairs. Then captioning continues while they learn to generate from captions without the held-out pairs. As for Show-o,
h_v is aligned with words, and words are read in its place.
"""

import random
from pathlib import Path

import torch
from torch import Tensor, nn

from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.demo.pretrain import LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, first_images, matrices, optimize, save_as_run, unit
from reca.models.common.chat import END, Prompt
from reca.models.common.text import encode
from reca.models.harmon import Adapter, modules, prompt
from reca.models.harmon.loss import image_loss, prepare_images, sample_prompts
from reca.rng import CounterRNG, RandomStream
from reca.toy_datasets.captions import QUESTIONS, TEMPLATES, caption
from reca.toy_datasets.shapes.splits import captioned, understood
from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy

UNDERSTANDING_STEPS, GENERATION_STEPS = 200, 1000  # generation steps also train captioning
OFFSET = 3.0  # standard deviation of the input bias of the diffusion head
UNDERSTANDING_ROLES = ("shared_encoder", "shared_lm", "embed")  # and proj_in


class _RecordsConditions(Adapter):
    """A Harmon that records the last conditions of its diffusion head."""

    conditioned: Tensor  # [B, m n, D]

    def condition(self, *args, **kwargs) -> Tensor:
        self.conditioned = super().condition(*args, **kwargs)
        return self.conditioned


class _HighNoiseRNG(CounterRNG):
    """Draws high-noise timesteps more often: the last tenth with probability 0.3."""

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        uniform = super().uniform(purpose, sample_ids, n)
        if purpose is not RandomStream.TIMESTEP:
            return uniform
        return (1 - (1 - uniform).square()).clamp(max=1 - 2**-24)  # below 1, as in CounterRNG


def pretrain(recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and save a run in `folder`."""
    torch.manual_seed(seed)
    recipe.model.seed = seed
    model = _RecordsConditions.load(recipe.model).train()
    model.codec.fit(unit(first_images(understood(seed), min(scale, 0.25))))
    net = model.mar.diffloss.net
    nn.init.normal_(model.llm.model.embed_tokens.weight, std=0.3)
    # LayerNorm removes the norm of its input, which predicting the noise needs; a large bias nearly preserves it.
    nn.init.normal_(net.input_proj.bias, std=OFFSET)
    task = _Task(model, seed, random.Random(seed), scale)
    understanding, generation = scaled(UNDERSTANDING_STEPS, scale), scaled(GENERATION_STEPS, scale)

    language = (model.llm.model.layers, model.mar.encoder_blocks)
    roles = model.roles()
    understanding_parameters = [
        p for name, p in model.named_parameters() if roles[name] in UNDERSTANDING_ROLES or name.startswith("proj_in.")
    ]
    optimize(understanding_parameters, matrices(*language), lambda step: task.caption_loss(), understanding, progress)

    everything = [*model.parameters(), *task.readout.parameters()]
    layers = matrices(*language, model.mar.decoder_blocks, net.res_blocks)
    total = lambda step: task.generation_loss(step) + task.caption_loss()  # noqa: E731
    optimize(everything, layers, total, generation, progress, done=understanding)

    finished = Adapter.load(recipe.model)
    finished.load_state_dict(model.state_dict())
    save_as_run(finished, recipe, folder, understanding + generation)
    return finished


class _Task:
    """Losses of one pre-training step."""

    def __init__(self, model: _RecordsConditions, seed: int, rng: random.Random, scale: float):
        self.model, self.rng, self.noise_rng = model, rng, _HighNoiseRNG(seed)
        self.generation_split, self.caption_split = captioned(seed), understood(seed)
        self.generation_latents, self.caption_latents = (
            model.latents(unit(first_images(split, scale))) for split in (self.generation_split, self.caption_split)
        )
        self.end = model.tokenizer.convert_tokens_to_ids(END)
        self.buffers, self.tokens = model.config.mar.buffers, self.caption_latents[0, :, :, 0].numel()
        self.readout = nn.Linear(model.config.mar.width, modules.channels(model.config))
        self.words = [self.on_buffers(caption(self.caption_split.scene(i))) for i in range(len(self.caption_latents))]

    def on_buffers(self, text: str) -> list[int]:
        """Tokenize a caption for the buffers of h_v, padded with the end of text."""
        return pad_tokens(encode(self.model.tokenizer, text), self.buffers, self.end)

    def with_words(self, given: Prompt, words: list[int]) -> Prompt:
        """Replace h_v's buffer tokens by words, and its image tokens by the end of text."""
        ids, slot, labels = given
        h_v = [self.end] * self.tokens + words
        if labels is not None:
            labels = labels[:slot] + [IGNORE_INDEX] * len(h_v) + labels[slot:]
        return Prompt(ids[:slot] + h_v + ids[slot:], None, labels)

    def generation_loss(self, step: int) -> Tensor:
        """Compute the generation loss.

        An auxiliary linear readout trains the head's conditions to predict the latents. The diffusion loss does so only
        at high noise, where its weight is small.
        """
        model, rng, latents = self.model, self.rng, self.generation_latents
        index, sample_ids, phrases, texts = draw_batch(self.generation_split, len(latents), step, rng)
        prompts = sample_prompts(model, Batch("t2i", sample_ids[: len(phrases)], phrases), self.noise_rng)
        templates = [prompt.template(model.tokenizer, rng.choice(TEMPLATES)) for _ in texts]
        prompts += [self.with_words(t, self.on_buffers(text)) for t, text in zip(templates, texts, strict=True)]
        tokens = latents[index]
        prepared = prepare_images(model, prompts, sample_ids, (tokens.shape[1], tokens.shape[2]), self.noise_rng)
        term = image_loss(model, prepared, tokens, self.noise_rng)
        error = self.readout(model.conditioned) - tokens.flatten(1, 2) / model.config.autoencoder.scale
        return term.sum / term.weight + error.square().mean()

    def caption_loss(self) -> Tensor:
        """Compute the losses of captioning images and words in place of h_v, and of aligning h_v with words."""
        model, index = self.model, torch.randint(len(self.caption_latents), (CAPTION_BATCH,))
        conversations = [
            prompt.conversation(
                model.tokenizer, [Turn(self.rng.choice(QUESTIONS), caption(self.caption_split.scene(i)))]
            )
            for i in index.tolist()
        ]
        words = [self.words[i] for i in index.tolist()]
        h_v = model.proj_in(model.mar.encode(self.caption_latents[index]))
        captioning = self.answer_loss(conversations, h_v)
        from_words = self.answer_loss(
            [self.with_words(t, w) for t, w in zip(conversations, words, strict=True)][: CAPTION_BATCH // 2]
        )
        table, buffers = model.llm.model.embed_tokens.weight, self.buffers
        ends = torch.full((CAPTION_BATCH, self.tokens), self.end)
        return (
            captioning
            + from_words
            + alignment(h_v[:, :buffers], torch.tensor(words), table)
            + alignment(h_v[:, buffers:], ends, table)
        )

    def answer_loss(self, conversations: list[Prompt], h_v: Tensor | None = None) -> Tensor:
        """Compute the mean cross-entropy of answer tokens."""
        model = self.model
        width = model.config.language.hidden_size
        layout = prompt.layout(conversations, self.buffers, 0 if h_v is None else self.tokens)
        hidden = model.states(layout, torch.empty(len(conversations), 0, width) if h_v is None else h_v)
        return masked_linear_cross_entropy(hidden.flatten(0, 1), model.llm.lm_head.weight, layout.labels.flatten())


SETUPS = {
    "shapes": DemoSetup(
        recipe="harmon_tiny",
        steps=UNDERSTANDING_STEPS + GENERATION_STEPS,
        pretrain=pretrain,
        init_override="train.init_from={folder}",
        # Clipped at 8 standard deviations: with few diffusion steps the first ones amplify errors by thousands.
        sampling={"steps": 12, "guidance": 1.0, "diffusion_steps": 100, "clip_sample_range": 64.0, "batch": 300},
        description="A Harmon of 0.4 million parameters",
        assumptions=(
            "h_v is aligned with the text space: pre-training pulls h_v's buffer tokens to the embeddings of the "
            "words of a caption and its image tokens to that of the end of text, reads words in place of h_v, and "
            "generates images from them. Large models already have such alignment; here it is trained explicitly.",
            "Pre-training of generation has two aids that post-training lacks: a linear readout of latents from the "
            "diffusion head's conditions, discarded afterwards, and more frequent high-noise timesteps.",
            "Images are 20 pixels wide. Instead of KL-16, latents are principal components of patches of four pixels, "
            "fitted to images of all pairs.",
            LINEAR_LATENTS,
        ),
        omitted_variants={
            "RECA with h_v from the generation side": "Harmon has a single encoder for understanding and generation"
        },
    )
}
