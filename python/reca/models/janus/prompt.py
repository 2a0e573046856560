r"""Janus-Pro's sequences, with causal attention and padded on the left.

    t2i   bos <|User|> : caption \n\n <|Assistant|> : boi | codes
    reca  bos <|User|> : boi h_v eoi \n template \n\n <|Assistant|> : boi | codes
    i2t   bos system \n\n <|User|> : boi h_v eoi \n question \n\n <|Assistant|> : answer eos …

boi predicts the first code and each code the next one, so the last code is not an input. An unconditional prompt keeps
its length: all tokens between bos and the last boi become the padding token, which is attended to like any other token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.data.tasks import Turn
from reca.models.common.planned import padded
from reca_kernels import (
    IGNORE_INDEX,
    AttentionPlan,
    AttentionSpan,
    TextSegment,
    VisualSegment,
    attention_plan,
    concat_plan,
)
from reca_kernels.host import on_device

# The bars and spaces in these three are not ASCII characters.
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, BOI, EOI, IMAGE, USER, ASSISTANT)
WORDS = (":", "\n")  # words that prompts add to the user's text
Tokens = Callable[[str], list[int]]  # tokenises text to ids, without control tokens
Segment = TextSegment | VisualSegment
L = TypeVar("L", bound="Layout")


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the control tokens and of the speakers' names, which are one control token each in Janus-Pro.

    They are looked up in the tokenizer, because they differ between Janus-1.3B and Janus-Pro.
    """

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    image: int
    user: tuple[int, ...]
    assistant: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        bos, eos, pad, boi, eoi, image, user, assistant = map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)
        return cls(bos, eos, pad, boi, eoi, image, (user,), (assistant,))


@dataclass(frozen=True)
class Layout:
    """A batch of sequences, padded on the left.

    src           int32 [B, L]: token ids; -1 - r for row r of the visual embeddings: per sample h_v, then codes
    position_ids  int64 [B, L]: position ids, which skip padding
    labels        int64 [B, L]: the token itself where it is to be predicted, else IGNORE_INDEX; codes have none here
    lengths       length of each sample without padding
    """

    src: Tensor
    position_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    def to(self: L, device: torch.device) -> L:
        src, positions, labels = (on_device(x, device) for x in (self.src, self.position_ids, self.labels))
        return replace(self, src=src, position_ids=positions, labels=labels)

    def spans(self) -> list[tuple[AttentionSpan, ...]]:
        """Return the attention spans of each sample."""
        return padded(self.lengths, self.src.shape[1])

    def plan(self) -> AttentionPlan:
        return attention_plan(self.spans(), device=self.src.device)


def layout(samples: Sequence[Sequence[Segment]], v: Vocabulary) -> Layout:
    """Lay out samples as one left-padded batch."""
    plan = concat_plan(samples, layout="left", pad_id=v.pad)
    return Layout(plan.src, plan.position_ids, plan.labels, tuple(plan.cu_seqlens.diff().tolist()))


def drop(given: Layout, dropped: Sequence[bool], codes: int, v: Vocabulary) -> Layout:
    """Replace the condition of dropped samples by padding tokens: all between bos and the last boi.

    codes: number of code tokens after the last boi.
    """
    src, boi = given.src.clone(), given.src.shape[1] - codes - 1
    for row, (gone, length) in enumerate(zip(dropped, given.lengths, strict=True)):
        if gone:
            src[row, src.shape[1] - length + 1 : boi] = v.pad
    return replace(given, src=src)


def caption(tokens: Tokens, text: str, v: Vocabulary, most: int | None = None) -> list[int]:
    """Build the prompt for the image of a caption, up to the image's boi.

    most: maximum tokens of the prompt; the caption is truncated. Raises ValueError if nothing of it would be left.
    """
    before, asked, frame = [v.bos, *v.user], message(tokens, text), reply(tokens, v)
    if most is not None:
        asked = asked[: _room(most, len(before) + len(frame), len(tokens(":")) + 1)]
    return [*before, *asked, *frame]


def with_image(
    tokens: Tokens, text: str, v: Vocabulary, hv_tokens: int, system: str = "", most: int | None = None
) -> list[Segment]:
    """Build the prompt of an image and a text, up to the start of the reply.

    most: maximum tokens of the prompt; the text is truncated. Raises ValueError if nothing of it would be left.
    """
    before = [v.bos, *(tokens(f"{system}\n\n") if system else []), *v.user, *tokens(": "), v.boi]
    said, frame = tokens(f"\n{text}".rstrip() + "\n\n"), reply(tokens, v)
    if most is not None:
        said = said[: _room(most, len(before) + hv_tokens + 1 + len(frame), len(tokens("\n")) + 1)]
    return [TextSegment(before), VisualSegment(hv_tokens), TextSegment([v.eoi, *said, *frame])]


def text_length(segments: Sequence[Segment]) -> int:
    """Return the number of text tokens of a prompt."""
    return sum(len(segment.ids) for segment in segments if isinstance(segment, TextSegment))


def conversation(
    tokens: Tokens, turns: Sequence[Turn], v: Vocabulary, hv_tokens: int, system: str, most: int
) -> list[Segment]:
    """Build a conversation about an image, truncated to `most` tokens; answers and their eos are labelled.

    Raises ValueError if `most` leaves no room for an answer even to an empty question.
    """
    before, image, asked = with_image(tokens, turns[0].question, v, hv_tokens, system)
    assert isinstance(asked, TextSegment) and isinstance(before, TextSegment)
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        heard = list(asked.ids) if number == 0 else [*v.user, *message(tokens, turn.question), *reply(tokens, v)]
        # The answer is tokenised together with the preceding colon.
        said = [*tokens(f": {turn.answer.strip()}".rstrip())[len(tokens(":")) :], v.eos]
        ids, labels = ids + heard + said, labels + [IGNORE_INDEX] * len(heard) + said
    seen, wordless = len(before.ids) + hv_tokens, [v.eoi, *tokens("\n\n"), *reply(tokens, v)]
    left = len(wordless) + _room(most, seen + len(wordless), 1)
    return [before, image, TextSegment(ids[:left], labels[:left])]


def _room(most: int, frame: int, least: int) -> int:
    """Return the number of tokens left for a text besides `frame` others. Raises ValueError if it is below `least`."""
    if most - frame < least:
        raise ValueError(
            f"model.max_length leaves {most} tokens for a prompt, but its frame (h_v, system prompt, speakers) takes "
            f"{frame} and its text needs at least {least}; raise it by at least {frame + least - most}"
        )
    return most - frame


def message(tokens: Tokens, text: str) -> list[int]:
    """Tokenise a user's message with the colon before it and the newlines after it; an empty one is the colon only."""
    text = text.strip()
    return tokens(f": {text}\n\n" if text else ":")


def reply(tokens: Tokens, v: Vocabulary) -> list[int]:
    """Return the token ids that start a reply."""
    return [*v.assistant, *tokens(":")]
