"""OpenUni's sequences: [chat turn with h_v and text][queries], causal; the queries come last."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.text import encode
from reca_kernels import ConcatPlan, Run, TextSegment, VisualSegment, concat_plan

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
CONTEXT = "<IMG_CONTEXT>"
UNCONDITIONAL = "Generate an image."
KEEP = "Keep the image as it is."
PAD_ID = 0  # the release pads with id 0, whatever the tokenizer calls its padding
MAX_TEXT = 128  # ids of a text-to-image prompt
MAX_LENGTH = 2048


def turn(content: str) -> str:
    """The user's turn and the start of the reply, which opens an image."""
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n<img>"


def with_image(text: str, tokens: int) -> str:
    return turn(f"<img>{CONTEXT * tokens}</img>\n{text}")


def caption(text: str | None) -> str:
    """Text to image; None is the unconditional prompt."""
    return turn(UNCONDITIONAL if text is None else f"Generate an image: {text.strip()}")


def question(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], tokens: int) -> tuple[list, list]:
    """Ids and labels of a conversation about an image; only answers and the token that ends them are learned."""
    ids, labels = [], []
    for i, (asked, answered) in enumerate(turns):
        image = f"<img>{CONTEXT * tokens}</img>\n" if i == 0 else ""
        before = encode(tokenizer, f"<|im_start|>user\n{image}{asked}<|im_end|>\n<|im_start|>assistant\n")
        answer = encode(tokenizer, f"{answered}<|im_end|>")
        newline = encode(tokenizer, "\n") if i + 1 < len(turns) else []
        ids += before + answer + newline
        labels += [-100] * len(before) + answer + [-100] * len(newline)
    return ids, labels


def plan(
    ids: Sequence[Sequence[int]], context_id: int, side: str, labels: Sequence[Sequence[int]] | None = None
) -> tuple[ConcatPlan, Tensor]:
    """Layout of a padded batch and its mask, bool [B, L]. Runs of `context_id` are where h_v goes."""
    samples = []
    for number, row in enumerate(ids):
        row_labels = labels[number] if labels is not None else [-100] * len(row)
        segments, start = [], 0
        while start < len(row):
            end = start
            while end < len(row) and (row[end] == context_id) == (row[start] == context_id):
                end += 1
            image = row[start] == context_id
            segments.append(VisualSegment(end - start) if image else TextSegment(row[start:end], row_labels[start:end]))
            start = end
        samples.append(segments)
    layout = concat_plan(samples, layout=side, pad_id=PAD_ID)
    return layout, layout.segment_ids >= 0


def positions(mask: Tensor) -> Tensor:
    """Position ids, int64 [B, L]: padding does not count."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def runs(mask: Tensor, side: str, cached: bool = False) -> list[tuple[Run, ...]]:
    """Per sample what its rows see. mask: of a batch padded on `side`, on the host."""
    found = []
    for rows in mask.sum(1).tolist():
        both = Run(mask.shape[1] - rows, "pad", cached=cached), Run(rows, cached=cached)
        found.append(both if side == "left" else both[::-1])
    return found


def extend(mask: Tensor, queries: int) -> Tensor:
    """The mask of prompt and queries, bool [B, L + queries]."""
    return torch.cat((mask, mask.new_ones(len(mask), queries)), dim=1)
