"""Prompts in Qwen's chat format, which Harmon and OpenUni share.

    <|im_start|>user \n TEXT <|im_end|> \n <|im_start|>assistant \n REPLY <|im_end|>

What stands on either side of an image is tokenised apart. Control tokens are put in by id, never by text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from reca.models.common.text import control, encode
from reca_kernels import IGNORE_INDEX, TextSegment, VisualSegment

START, END = "<|im_start|>", "<|im_end|>"
UNCONDITIONAL = "Generate an image."
WORDS = ("user", "assistant", "Generate", "an", "image", ":", ".", "\n")  # what prompts add to the user's text


class Prompt(NamedTuple):
    """Token ids of one sample.

    slot    index in `ids` at which the tokens of h_v are inserted; None: the prompt has no image
    labels  per token what is learned of it, IGNORE_INDEX for nothing; None: nothing is learned
    """

    ids: list[int]
    slot: int | None = None
    labels: list[int] | None = None

    def segments(self, tokens: int) -> list[TextSegment | VisualSegment]:
        """Split the prompt at its slot, with `tokens` tokens of h_v in between."""
        labels = self.labels or [IGNORE_INDEX] * len(self.ids)
        if self.slot is None or not tokens:
            return [TextSegment(self.ids, labels)]
        before, after = (
            TextSegment(self.ids[: self.slot], labels[: self.slot]),
            TextSegment(self.ids[self.slot :], labels[self.slot :]),
        )
        return [before, VisualSegment(tokens), after]


def caption_request(text: str | None) -> str:
    """Ask for the image of a caption; None asks for any image (the unconditional text)."""
    return UNCONDITIONAL if text is None else f"Generate an image: {text.strip()}"


def chat_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Frame a user's text and start the reply. The text is tokenised together with the line break before it."""
    return [control(tokenizer, START), *encode(tokenizer, f"user\n{text}"), *reply_start(tokenizer)]


def reply_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End a user's turn and start the reply to it."""
    start, end = control(tokenizer, START), control(tokenizer, END)
    return [end, *encode(tokenizer, "\n"), start, *encode(tokenizer, "assistant\n")]


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    question: Callable[[PreTrainedTokenizerBase, str], Prompt],
) -> Prompt:
    """Join turns about an image into one labelled prompt: the replies and the token that ends each are learned.

    question: the first question with the image's slot.
    """
    ids: list[int] = []
    labels: list[int] = []
    slot = None
    for asked, answered in turns:
        if ids:
            heard = [*encode(tokenizer, "\n"), *chat_turn(tokenizer, asked)]
        else:
            heard, slot, _ = question(tokenizer, asked)
        said = [*encode(tokenizer, answered), control(tokenizer, END)]
        ids, labels = ids + heard + said, labels + [IGNORE_INDEX] * len(heard) + said
    return Prompt(ids, slot, labels)
