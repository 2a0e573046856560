"""JanusFlow's sequences, causal from end to end and padded on the left.

    t2i   bos User: caption \n\n Assistant: | time latents
    reca  bos User: begin h_v eoi \n template \n\n Assistant: | time latents
    i2t   bos system \n\n User: begin h_v eoi \n question \n\n Assistant: answer eos …

`begin` is an embedding of its own in the place of boi, and the embedding of the time stands where text-to-image prompts
end in boi. Who speaks is said in words of the vocabulary. Of a prompt without its condition only bos is seen; what is
behind it keeps its place, so that positions count on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from reca.data.tasks import Turn
from reca.models.janus import prompt as janus
from reca.models.janus.prompt import BOI, BOS, EOI, EOS, IMAGE, PAD, Segment, Tokens, Vocabulary
from reca_kernels import AttentionSpan, TextSegment, VisualSegment

USER, ASSISTANT = "User", "Assistant"
SPECIAL_TOKENS = (BOS, EOS, PAD, BOI, EOI, IMAGE)
WORDS = (USER, ASSISTANT, *janus.WORDS)


def vocabulary(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Vocabulary:
    """Look up the ids of control tokens, and of the words for who speaks."""
    bos, eos, pad, boi, eoi, image = map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)
    return Vocabulary(bos, eos, pad, boi, eoi, image, tuple(tokens(USER)), tuple(tokens(ASSISTANT)))


@dataclass(frozen=True)
class Layout(janus.Layout):
    """A batch of prompts, and of the images behind them.

    unseen  per sample how many rows behind bos are not seen: none, or the whole condition
    """

    unseen: tuple[int, ...]

    def spans(self) -> list[tuple[AttentionSpan, ...]]:
        """Return per sample what its rows see."""
        found = []
        for spans, unseen in zip(super().spans(), self.unseen, strict=True):
            *padding, own = spans
            rest = own.length - 1 - unseen
            parts = [AttentionSpan(1), AttentionSpan(unseen, "pad"), AttentionSpan(rest)] if unseen else [own]
            found.append((*padding, *(part for part in parts if part.length)))
        return found

    def behind(self, rows: int) -> list[tuple[AttentionSpan, ...]]:
        """Return what `rows` rows behind these see, whose keys and values are cached."""
        return [(*(span._replace(cached=True) for span in spans), AttentionSpan(rows)) for spans in self.spans()]


def image_layout(prompts: Sequence[Sequence[Segment]], dropped: Sequence[bool], v: Vocabulary, rows: int = 0) -> Layout:
    """Lay out prompts as one batch, and `rows` rows of an image behind each. dropped: which lose their condition."""
    images = [VisualSegment(rows)] if rows else []
    made = janus.layout([[*prompt, *images] for prompt in prompts], v)
    unseen = tuple(length - rows - 1 if gone else 0 for length, gone in zip(made.lengths, dropped, strict=True))
    return Layout(made.src, made.position_ids, made.labels, made.lengths, unseen)


def caption(tokens: Tokens, text: str, v: Vocabulary, most: int | None = None) -> list[int]:
    """Ask for the image of a caption. most: as in Janus-Pro."""
    return janus.caption(tokens, text, v, None if most is None else most + 1)[:-1]


def with_image(
    tokens: Tokens, text: str, v: Vocabulary, hv_tokens: int, system: str = "", most: int | None = None
) -> list[Segment]:
    """Give an image and a text, and begin the reply. most: as in Janus-Pro."""
    return _begun(janus.with_image(tokens, text, v, hv_tokens, system, most))


def conversation(
    tokens: Tokens, turns: Sequence[Turn], v: Vocabulary, hv_tokens: int, system: str, most: int
) -> list[Segment]:
    """Label a conversation about an image, cut to `most` tokens: the answers and the eos behind each are learned."""
    return _begun(janus.conversation(tokens, turns, v, hv_tokens, system, most))


def _begun(given: Sequence[Segment]) -> list[Segment]:
    """Take boi from before an image: its row is one of the image's."""
    before, image, said = given
    assert isinstance(before, TextSegment) and isinstance(image, VisualSegment)
    return [TextSegment(before.ids[:-1]), VisualSegment(image.n + 1), said]
