"""OpenUni's sequences: [chat turn with h_v and text][queries], with causal attention.

Prompts are padded on the left or right as in the release; the queries follow the padded prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.common import chat
from reca.models.common.chat import END, START, Prompt, caption_request, chat_turn, reply_start
from reca.models.common.planned import padded
from reca.models.common.text import control, encode
from reca_kernels import AttentionSpan, concat_plan
from reca_kernels.host import on_device

IMAGE, END_OF_IMAGE, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = [START, END, IMAGE, END_OF_IMAGE, CONTEXT]
KEEP = "Keep the image as it is."
PAD_ID = 0  # the release pads with id 0, whatever the tokenizer's padding token is
MAX_TEXT = 128  # maximum tokens of a text-to-image prompt
MAX_LENGTH = 2048  # maximum tokens of a prompt with an image and of a conversation, h_v included


def caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Build the prompt for the image of a caption, truncated as in the release; None: the unconditional prompt."""
    return Prompt(whole_caption(tokenizer, text).ids[:MAX_TEXT])


def whole_caption(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Prompt:
    """Build the prompt of `caption` without truncating it."""
    return Prompt([*chat_turn(tokenizer, caption_request(text)), control(tokenizer, IMAGE)])


def with_image(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Build a prompt of an image and a text whose reply starts an image."""
    asked = question(tokenizer, text)
    return asked._replace(ids=[*asked.ids, control(tokenizer, IMAGE)])


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Build the prompt of a question about an image."""
    before = [control(tokenizer, START), *encode(tokenizer, "user\n"), control(tokenizer, IMAGE)]
    behind = [control(tokenizer, END_OF_IMAGE), *encode(tokenizer, f"\n{text}")]
    return Prompt([*before, *behind, *reply_start(tokenizer)], len(before))


def conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], most: int) -> Prompt:
    """Build a conversation about an image, truncated to `most` tokens besides h_v.

    Replies and their end tokens are labelled.
    """
    ids, slot, labels = chat.conversation(tokenizer, turns, question)
    assert labels is not None
    return Prompt(ids[:most], slot, labels[:most])


class Layout(NamedTuple):
    """A padded batch of prompts, followed by queries.

    src        int32 [B, L]: token ids; -1 - r for row r of the batch's h_v
    labels     int64 [B, L]: the token itself where it is to be predicted, else IGNORE_INDEX
    positions  int64 [B, L + queries]: position ids, which skip padding
    lengths    length of each sample's prompt
    side       side of the padding: left or right
    """

    src: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    side: str

    def to(self, device: torch.device) -> "Layout":
        src, labels, positions = (on_device(x, device) for x in (self.src, self.labels, self.positions))
        return self._replace(src=src, labels=labels, positions=positions)

    def spans(self) -> list[tuple[AttentionSpan, ...]]:
        """Return the attention spans of each sample's prompt."""
        return padded(self.lengths, self.src.shape[1], self.side)


def layout(prompts: Sequence[Prompt], hv_tokens: int, side: str, queries: int = 0) -> Layout:
    """Lay out prompts as a batch, padded on `side`. hv_tokens: tokens of h_v in each prompt with a slot."""
    plan = concat_plan([asked.segments(hv_tokens) for asked in prompts], layout=side, pad_id=PAD_ID)
    mask = plan.segment_ids >= 0
    lengths = tuple(mask.sum(1).tolist())
    mask = torch.cat((mask, mask.new_ones(len(mask), queries)), dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Layout(plan.src, plan.labels, positions, lengths, side)
