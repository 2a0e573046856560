r"""Prompts in Qwen's chat format, which Harmon and OpenUni share.

    <|im_start|>user \n TEXT <|im_end|> \n <|im_start|>assistant \n REPLY <|im_end|>

The text before an image and the text after it are tokenised separately. Control tokens are inserted by id, never as
text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from reca.models.common import inference
from reca.models.common.text import control, encode
from reca_kernels import IGNORE_INDEX, TextSegment, VisualSegment

START, END = "<|im_start|>", "<|im_end|>"
UNCONDITIONAL = "Generate an image."
WORDS = ("user", "assistant", "Generate", "an", "image", ":", ".", "\n")  # words that prompts add to the user's text


class Prompt(NamedTuple):
    """Token ids of one sample.

    slot    index in `ids` at which the tokens of h_v are inserted; None: the prompt has no image
    labels  for each token its id if it is to be predicted, else IGNORE_INDEX; None: no token has a loss
    """

    ids: list[int]
    slot: int | None = None
    labels: list[int] | None = None

    def segments(self, tokens: int) -> list[TextSegment | VisualSegment]:
        """Split the prompt at its slot and insert a segment of `tokens` tokens of h_v there."""
        labels = self.labels or [IGNORE_INDEX] * len(self.ids)
        if self.slot is None or not tokens:
            return [TextSegment(self.ids, labels)]
        before, after = (
            TextSegment(self.ids[: self.slot], labels[: self.slot]),
            TextSegment(self.ids[self.slot :], labels[self.slot :]),
        )
        return [before, VisualSegment(tokens), after]


def truncated(prompts: Sequence[Prompt], most: int, end: int = 0) -> list[Prompt]:
    """Truncate users' prompts as `inference.truncated` does. most: maximum tokens besides h_v."""
    rows = inference.truncated([asked.ids for asked in prompts], most, end)
    return [asked._replace(ids=ids) for asked, ids in zip(prompts, rows, strict=True)]


def caption_request(text: str | None) -> str:
    """Return the request for the image of a caption; None returns the unconditional request."""
    return UNCONDITIONAL if text is None else f"Generate an image: {text.strip()}"


def chat_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a user's turn and the start of the reply. The text is tokenised together with the preceding newline."""
    return [control(tokenizer, START), *encode(tokenizer, f"user\n{text}"), *reply_start(tokenizer)]


def reply_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end a user's turn and start the reply."""
    start, end = control(tokenizer, START), control(tokenizer, END)
    return [end, *encode(tokenizer, "\n"), start, *encode(tokenizer, "assistant\n")]


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    question: Callable[[PreTrainedTokenizerBase, str], Prompt],
) -> Prompt:
    """Join turns about an image into one prompt in which the replies and their end tokens are labelled.

    question: builds the prompt of the first question, with the image's slot.
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
