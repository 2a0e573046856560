"""Harmon's sequences: [chat turn, with h_v in it][visible tokens, buffers], in Qwen2's chat format.

The language model is causal over all of it. Samples are padded on the right, where no real row looks, so no mask is
needed, and positions count up from 0. The release pads between prompt and image instead and masks that; the numbers
are the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.common.text import control, encode
from reca_kernels import TextSegment, VisualSegment, concat_plan
from reca_kernels.host import on_device

START, END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [START, END, "<|endoftext|>"]
WORDS = ("user", "assistant", "Generate", "an", "image", ":", ".", "\n")  # what prompts add to the user's text
UNCONDITIONAL = "Generate an image."
SLOT = 3  # the image comes after the third id: <|im_start|>, user, line break
MAX_TEXT, MAX_CONVERSATION = 128, 1472
IGNORE = -100


class Prompt(NamedTuple):
    """Ids, the place among them where h_v goes (None: there is none), and labels (None: nothing is learned)."""

    ids: list[int]
    slot: int | None = None
    labels: list[int] | None = None


def turn(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The user's turn and the start of the reply. The text is tokenised together with the line break before it."""
    return [control(tokenizer, START), *encode(tokenizer, f"user\n{text}"), *_reply(tokenizer)]


def _reply(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands between a user's text and the reply to it."""
    start, end = control(tokenizer, START), control(tokenizer, END)
    return [end, *encode(tokenizer, "\n"), start, *encode(tokenizer, "assistant\n")]


def caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Text to image; None is the unconditional prompt."""
    return Prompt(whole_caption(tokenizer, text)[:MAX_TEXT])


def whole_caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[int]:
    """The ids before they are cut to what the release keeps."""
    return turn(tokenizer, UNCONDITIONAL if text is None else f"Generate an image: {text.strip()}")


def template(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """RECA's prompt; None is the unconditional text, which keeps the image.

    The template follows a line break of its own and the whole is tokenised at once, so that in Qwen2's vocabulary two
    line breaks merge into the one token before the image.
    """
    return Prompt(turn(tokenizer, UNCONDITIONAL if text is None else f"\n{text}")[:MAX_TEXT], SLOT)


def conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Prompt:
    """A conversation about an image; answers and the token that ends each are learned."""
    ids, slot, labels = [], SLOT, []
    for asked, answered in turns:
        if ids:
            heard = encode(tokenizer, "\n") + turn(tokenizer, asked)
        else:
            heard, slot, _ = question(tokenizer, asked)
        said = [*encode(tokenizer, answered), control(tokenizer, END)]
        ids, labels = ids + heard + said, labels + [IGNORE] * len(heard) + said
    return Prompt(ids[:MAX_CONVERSATION], slot, labels[:MAX_CONVERSATION])


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """A question about an image. What stands on either side of the image is tokenised apart."""
    before = [control(tokenizer, START), *encode(tokenizer, "user\n")]
    return Prompt([*before, *encode(tokenizer, f"\n{text}"), *_reply(tokenizer)], len(before))


class Layout(NamedTuple):
    """A batch of sequences.

    src     int32 [B, L]: token ids; -1 - r for row r of the batch's visual rows, B * n of them
    labels  int64 [B, L]: what the row after this one is, -100 where that is not learned
    rows    int64 [B, n]: where in the flattened batch a visual row stands; 0 for rows that stand nowhere
    """

    src: Tensor
    labels: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "Layout":
        return Layout(*(on_device(tensor, device) for tensor in self))


def layout(prompts: Sequence[Prompt], buffers: int, given: int, drawn: Sequence[int] | None = None) -> Layout:
    """Lay out prompts whose visual rows come as the encoder makes them, buffers first.

    given  tokens of h_v, 0: none. A sample's visual rows are buffers, h_v's tokens, …
    drawn  visible tokens of each image to draw, None: none is drawn. … buffers, as many tokens as the longest has
    In the sequence the buffers stand behind the tokens they belong to.
    """
    most = max(drawn) if drawn is not None else 0
    front = buffers + given if given else 0
    n = front + (buffers + most if drawn is not None else 0)
    samples, order = [], []
    for number, (ids, slot, labels) in enumerate(prompts):
        base, learned = number * n, labels or [IGNORE] * len(ids)
        segments = [TextSegment(ids, learned)]
        if given:
            before, after = TextSegment(ids[:slot], learned[:slot]), TextSegment(ids[slot:], learned[slot:])
            segments = [before, VisualSegment(front), after]
            order.append(base + torch.arange(front).roll(-buffers))
        if drawn is not None:
            tail = buffers + drawn[number]
            segments.append(VisualSegment(tail))
            order.append(base + front + torch.arange(tail).roll(-buffers))
        samples.append(segments)
    plan = concat_plan(samples, layout="right")
    src, rows = plan.src, torch.zeros(len(prompts) * n, dtype=torch.int64)
    if order:
        visual = (src < 0).flatten().nonzero()[:, 0]  # in the order of `order`
        order = torch.cat(order)
        src.view(-1)[visual] = (-1 - order).int()
        rows[order] = visual
    labels = torch.cat((plan.labels[:, 1:], plan.labels.new_full((len(prompts), 1), IGNORE)), dim=1)
    return Layout(src, labels, rows.view(len(prompts), n))
