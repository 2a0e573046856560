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

from reca.models.common import chat
from reca.models.common.chat import END, START, UNCONDITIONAL, Prompt, caption_request, chat_turn, reply_start
from reca.models.common.text import control, encode
from reca_kernels import IGNORE_INDEX, VisualSegment, concat_plan
from reca_kernels.host import on_device

SPECIAL_TOKENS = [START, END, "<|endoftext|>"]
SLOT = 3  # the image comes after the third id: <|im_start|>, user, line break
MAX_TEXT, MAX_CONVERSATION = 128, 1472


def caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Ask for the image of a caption; None is the unconditional prompt."""
    return Prompt(whole_caption(tokenizer, text)[:MAX_TEXT])


def whole_caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[int]:
    """Tokenise `caption` before it is cut to what the release keeps."""
    return chat_turn(tokenizer, caption_request(text))


def template(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Make RECA's prompt; None is the unconditional text, which keeps the image.

    The template follows a line break of its own and the whole is tokenised at once, so that in Qwen2's vocabulary two
    line breaks merge into the one token before the image.
    """
    return Prompt(chat_turn(tokenizer, UNCONDITIONAL if text is None else f"\n{text}")[:MAX_TEXT], SLOT)


def conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Prompt:
    """Label a conversation about an image, cut to what the release keeps; replies and their ends are learned."""
    ids, slot, labels = chat.conversation(tokenizer, turns, question)
    assert labels is not None
    return Prompt(ids[:MAX_CONVERSATION], slot, labels[:MAX_CONVERSATION])


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Ask about an image. What stands on either side of the image is tokenised apart."""
    before = [control(tokenizer, START), *encode(tokenizer, "user\n")]
    return Prompt([*before, *encode(tokenizer, f"\n{text}"), *reply_start(tokenizer)], len(before))


class Layout(NamedTuple):
    """A batch of sequences.

    src      int32 [B, L]: token ids; -1 - r for row r of the batch's visual rows, B * n of them
    labels   int64 [B, L]: what the row after this one is, IGNORE_INDEX where that is not learned
    rows     int64 [B, n]: where in the flattened batch a visual row stands; 0 for rows that stand nowhere
    lengths  per sample its rows without padding
    """

    src: Tensor
    labels: Tensor
    rows: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Layout":
        src, labels, rows = (on_device(tensor, device) for tensor in (self.src, self.labels, self.rows))
        return Layout(src, labels, rows, self.lengths)


def layout(
    prompts: Sequence[Prompt], buffers: int, hv_tokens: int, visible_counts: Sequence[int] | None = None
) -> Layout:
    """Lay out prompts whose visual rows come as the encoder makes them, buffers first.

    A sample's visual rows are buffers and h_v's tokens, then buffers and as many visible tokens as the longest has.
    In the sequence the buffers stand behind the tokens they belong to.

    hv_tokens       tokens of h_v; 0: there is none
    visible_counts  visible tokens of each image to generate; None: none is generated
    """
    most = max(visible_counts) if visible_counts is not None else 0
    front = buffers + hv_tokens if hv_tokens else 0
    n = front + (buffers + most if visible_counts is not None else 0)
    samples, order = [], []
    for number, asked in enumerate(prompts):
        base, segments = number * n, asked.segments(front)
        if front:
            order.append(base + torch.arange(front).roll(-buffers))
        if visible_counts is not None:
            tail = buffers + visible_counts[number]
            segments.append(VisualSegment(tail))
            order.append(base + front + torch.arange(tail).roll(-buffers))
        samples.append(segments)
    plan = concat_plan(samples, layout="right")
    src, rows = plan.src, torch.zeros(len(prompts) * n, dtype=torch.int64)
    if order:
        visual = (src < 0).flatten().nonzero()[:, 0]  # in the order of `places`
        places = torch.cat(order)
        src.view(-1)[visual] = (-1 - places).int()
        rows[places] = visual
    labels = torch.cat((plan.labels[:, 1:], plan.labels.new_full((len(prompts), 1), IGNORE_INDEX)), dim=1)
    return Layout(src, labels, rows.view(len(prompts), n), tuple(plan.cu_seqlens.diff().tolist()))
