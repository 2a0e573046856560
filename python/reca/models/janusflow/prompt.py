r"""JanusFlow's sequences, with causal attention and padded on the left.

    t2i   bos User: caption \n\n Assistant: | time latents
    reca  bos User: begin h_v eoi \n template \n\n Assistant: | time latents
    i2t   bos system \n\n User: begin h_v eoi \n question \n\n Assistant: answer eos …

`begin` is a learned embedding in place of boi, and the time embedding takes the place of the boi that ends Janus-Pro's
text-to-image prompts. Speakers are ordinary words of the vocabulary. In an unconditional prompt, only bos is attended
to; the other tokens remain as padding, so that position ids are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from reca.models.janus import prompt as janus
from reca.models.janus.prompt import BOI, BOS, EOI, EOS, IMAGE, PAD, Segment, Tokens, Vocabulary
from reca_kernels import AttentionSpan, TextSegment, VisualSegment

USER, ASSISTANT = "User", "Assistant"
SPECIAL_TOKENS = (BOS, EOS, PAD, BOI, EOI, IMAGE)
WORDS = (USER, ASSISTANT, *janus.WORDS)


def vocabulary(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Vocabulary:
    """Look up the ids of control tokens, and of the speakers' names."""
    bos, eos, pad, boi, eoi, image = map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)
    return Vocabulary(bos, eos, pad, boi, eoi, image, tuple(tokens(USER)), tuple(tokens(ASSISTANT)))


@dataclass(frozen=True)
class Layout(janus.Layout):
    """A batch of prompts, possibly followed by images.

    unseen  per sample, the number of tokens after bos that are not attended to: 0, or the whole condition
    """

    unseen: tuple[int, ...]

    def spans(self) -> list[tuple[AttentionSpan, ...]]:
        """Return the attention spans of each sample."""
        found = []
        for spans, unseen in zip(super().spans(), self.unseen, strict=True):
            *padding, own = spans
            rest = own.length - 1 - unseen
            parts = [AttentionSpan(1), AttentionSpan(unseen, "pad"), AttentionSpan(rest)] if unseen else [own]
            found.append((*padding, *(part for part in parts if part.length)))
        return found


def image_layout(prompts: Sequence[Sequence[Segment]], dropped: Sequence[bool], v: Vocabulary, rows: int = 0) -> Layout:
    """Lay out prompts, each followed by `rows` tokens of an image, as one batch. dropped: the unconditional samples."""
    images = [VisualSegment(rows)] if rows else []
    made = janus.layout([[*prompt, *images] for prompt in prompts], v)
    unseen = tuple(length - rows - 1 if gone else 0 for length, gone in zip(made.lengths, dropped, strict=True))
    return Layout(made.src, made.position_ids, made.labels, made.lengths, unseen)


def begun(given: Sequence[Segment]) -> list[Segment]:
    """Replace the boi before an image by one more row of the image, for `begin`."""
    before, image, said = given
    assert isinstance(before, TextSegment) and isinstance(image, VisualSegment)
    return [TextSegment(before.ids[:-1]), VisualSegment(image.n + 1), said]
