"""OpenUni's sequences: [chat turn with h_v and text][queries], causal; the queries come last."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.common.text import control, encode
from reca_kernels import AttentionSpan, ConcatPlan, TextSegment, VisualSegment, concat_plan

START, END, IMAGE, END_OF_IMAGE, CONTEXT = "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = [START, END, IMAGE, END_OF_IMAGE, CONTEXT]
IGNORE = -100
UNCONDITIONAL = "Generate an image."
KEEP = "Keep the image as it is."
PAD_ID = 0  # the release pads with id 0, whatever the tokenizer calls its padding
MAX_TEXT = 128  # ids of a text-to-image prompt
MAX_LENGTH = 2048


class Prompt(NamedTuple):
    """Ids, the place among them where h_v goes (None: there is none), and labels (None: nothing is learned)."""

    ids: list[int]
    slot: int | None = None
    labels: list[int] | None = None


def caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Text to image; None is the unconditional prompt."""
    content = UNCONDITIONAL if text is None else f"Generate an image: {text.strip()}"
    opens = control(tokenizer, IMAGE)
    return Prompt([control(tokenizer, START), *encode(tokenizer, f"user\n{content}"), *_reply(tokenizer), opens])


def with_image(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> Prompt:
    """An image and a text, and a reply that opens an image. most: tokens that the text is cut to."""
    asked = question(tokenizer, text, most)
    return asked._replace(ids=[*asked.ids, control(tokenizer, IMAGE)])


def question(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> Prompt:
    """An image and a text, and the start of the reply."""
    before = [control(tokenizer, START), *encode(tokenizer, "user\n"), control(tokenizer, IMAGE)]
    behind = [control(tokenizer, END_OF_IMAGE), *encode(tokenizer, f"\n{text}")[:most]]
    return Prompt([*before, *behind, *_reply(tokenizer)], len(before))


def conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Prompt:
    """A conversation about an image; only answers and the token that ends them are learned."""
    ids, slot, labels = [], None, []
    for i, (asked, answered) in enumerate(turns):
        if i == 0:
            heard, slot, _ = question(tokenizer, asked)
        else:
            heard = [control(tokenizer, START), *encode(tokenizer, f"user\n{asked}"), *_reply(tokenizer)]
        answer = [*encode(tokenizer, answered), control(tokenizer, END)]
        newline = encode(tokenizer, "\n") if i + 1 < len(turns) else []
        ids += heard + answer + newline
        labels += [IGNORE] * len(heard) + answer + [IGNORE] * len(newline)
    return Prompt(ids, slot, labels)


def _reply(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands between a user's text and the reply to it."""
    start, end = control(tokenizer, START), control(tokenizer, END)
    return [end, *encode(tokenizer, "\n"), start, *encode(tokenizer, "assistant\n")]


def plan(prompts: Sequence[Prompt], visual: int, side: str) -> tuple[ConcatPlan, Tensor]:
    """Layout of a padded batch and its mask, bool [B, L]. visual: rows of h_v of every prompt that has a slot."""
    samples = []
    for ids, slot, labels in prompts:
        learned = labels or [IGNORE] * len(ids)
        segments = [TextSegment(ids, learned)]
        if slot is not None:
            before, behind = TextSegment(ids[:slot], learned[:slot]), TextSegment(ids[slot:], learned[slot:])
            segments = [before, VisualSegment(visual), behind]
        samples.append(segments)
    layout = concat_plan(samples, layout=side, pad_id=PAD_ID)
    return layout, layout.segment_ids >= 0


def positions(mask: Tensor) -> Tensor:
    """Position ids, int64 [B, L]: padding does not count."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def runs(mask: Tensor, side: str, cached: bool = False) -> list[tuple[AttentionSpan, ...]]:
    """Per sample what its rows see. mask: of a batch padded on `side`, on the host."""
    found = []
    for rows in mask.sum(1).tolist():
        both = AttentionSpan(mask.shape[1] - rows, "pad", cached=cached), AttentionSpan(rows, cached=cached)
        found.append(both if side == "left" else both[::-1])
    return found


def extend(mask: Tensor, queries: int) -> Tensor:
    """The mask of prompt and queries, bool [B, L + queries]."""
    return torch.cat((mask, mask.new_ones(len(mask), queries)), dim=1)
