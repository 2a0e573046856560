"""Harmon's sequences: [chat turn, with h_v in it][visible tokens, buffers], in Qwen2's chat format.

Attention is causal over the whole sequence. In training, samples are padded on the right, so no token attends to
padding, no mask is needed and position ids count up from 0. The release pads between prompt and image instead and masks
the padding; the result is the same. Prompts that a KV cache keeps are padded on the left.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.common import chat
from reca.models.common.chat import END, START, UNCONDITIONAL, Prompt, caption_request, chat_turn, reply_start
from reca.models.common.inference import check_template
from reca.models.common.planned import padded
from reca.models.common.text import control, encode
from reca_kernels import IGNORE_INDEX, AttentionSpan, VisualSegment, concat_plan
from reca_kernels.host import on_device

SPECIAL_TOKENS = [START, END, "<|endoftext|>"]
SLOT = 3  # the image follows the third id: <|im_start|>, user, newline
MAX_TEXT, MAX_CONVERSATION = 128, 1472


def caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Build the prompt for the image of a caption; None builds the unconditional prompt."""
    return Prompt(whole_caption(tokenizer, text).ids[:MAX_TEXT])


def whole_caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Build the prompt of `caption` without truncating it."""
    return Prompt(chat_turn(tokenizer, caption_request(text)))


def template(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Build RECA's prompt; None uses the unconditional text with the image.

    The template starts with a newline and the turn is tokenised as a whole, so that in Qwen2's vocabulary two newlines
    merge into the one token before the image. Raises ValueError for a template that is too long.
    """
    if text is None:
        return Prompt(chat_turn(tokenizer, UNCONDITIONAL), SLOT)
    ids = chat_turn(tokenizer, f"\n{text}")
    check_template(text, len(ids), MAX_TEXT)
    return Prompt(ids, SLOT)


def conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Prompt:
    """Build a conversation about an image, truncated as in the release; replies and their end tokens are labelled."""
    ids, slot, labels = chat.conversation(tokenizer, turns, question)
    assert labels is not None
    return Prompt(ids[:MAX_CONVERSATION], slot, labels[:MAX_CONVERSATION])


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Build the prompt of a question. The text before the image and the text after it are tokenised separately."""
    before, said = [control(tokenizer, START), *encode(tokenizer, "user\n")], encode(tokenizer, f"\n{text}")
    return Prompt([*before, *said, *reply_start(tokenizer)], len(before))


class Layout(NamedTuple):
    """A batch of sequences.

    src      int32 [B, L]: token ids; -1 - r for row r of the batch's visual embeddings, flattened to B * n rows
    labels   int64 [B, L]: the next token, IGNORE_INDEX without a loss
    rows     int64 [B, n]: index of each visual embedding in the flattened batch; 0 for unused ones
    lengths  length of each sample without padding
    """

    src: Tensor
    labels: Tensor
    rows: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Layout":
        src, labels, rows = (on_device(tensor, device) for tensor in (self.src, self.labels, self.rows))
        return Layout(src, labels, rows, self.lengths)

    def spans(self) -> list[tuple[AttentionSpan, ...]]:
        """Return the attention spans of each sample of a left-padded batch."""
        return padded(self.lengths, self.src.shape[1])

    def position_ids(self) -> Tensor:
        """Compute the position ids of a left-padded batch, int64 [B, L]."""
        width = self.src.shape[1]
        rows = [torch.arange(length - width, length).clamp(min=0) for length in self.lengths]
        return on_device(torch.stack(rows), self.src.device)


def layout(
    prompts: Sequence[Prompt],
    buffers: int,
    hv_tokens: int,
    visible_counts: Sequence[int] | None = None,
    side: str = "right",
) -> Layout:
    """Lay out prompts and the visual embeddings of the encoder, in which buffers come first.

    A sample's visual embeddings are buffers and the tokens of h_v, then buffers and the visible tokens, padded to the
    largest number in the batch. In the sequence, buffers follow their tokens.

    hv_tokens       tokens of h_v; 0: no h_v
    visible_counts  visible tokens of each target image; None: no image is generated
    side            side of the padding
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
    plan = concat_plan(samples, layout=side)
    src, rows = plan.src, torch.zeros(len(prompts) * n, dtype=torch.int64)
    if order:
        visual = (src < 0).flatten().nonzero()[:, 0]  # in the same order as `places`
        places = torch.cat(order)
        src.view(-1)[visual] = (-1 - places).int()
        rows[places] = visual
    labels = torch.cat((plan.labels[:, 1:], plan.labels.new_full((len(prompts), 1), IGNORE_INDEX)), dim=1)
    return Layout(src, labels, rows.view(len(prompts), n), tuple(plan.cu_seqlens.diff().tolist()))
