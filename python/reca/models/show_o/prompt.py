"""Show-o's sequences: which token stands where, what each row may see, what it must predict.

    t2i        PAD… t2i bos text eos | soi image eoi              left-padded to a fixed text budget
    i2t vq     mmu soi image eoi bos text eos PAD…
    i2t clip   mmu system soi h_v eoi text PAD…
    reca clip  mmu soi h_v eoi bos template eos PAD… | soi image eoi     the first part has a fixed length
    reca vq    PAD… mmu soi h_v eoi bos template eos | soi image eoi
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = (
    "[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>",
)  # fmt: skip
END_OF_TEXT = "<|endoftext|>"
IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that are not text. Image code c is token offset + c; mask is the last token."""

    pad: int
    soi: int
    eoi: int
    t2i: int
    mmu: int
    bos: int
    eos: int
    offset: int
    codes: int

    @property
    def mask(self) -> int:
        return self.offset + self.codes

    @property
    def size(self) -> int:
        return self.mask + 1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, codes: int) -> "Vocabulary":
        """Ids of a tokenizer that has all of SPECIAL_TOKENS. Raises ValueError when one is missing."""
        pad, soi, eoi, _, _, t2i, mmu, *_ = ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        if None in ids or tokenizer.unk_token_id in (*ids, end):
            raise ValueError(f"the tokenizer lacks one of {', '.join((END_OF_TEXT, *SPECIAL_TOKENS))}")
        return cls(pad, soi, eoi, t2i, mmu, end, end, len(tokenizer), codes)


@dataclass
class Sequence:
    """A batch of sequences without their image codes.

    src      int64 [B, L]: token ids; -1 - r where row r of a sample's h_v stands (clip)
    image    where the N target codes stand, the same in every sample; None without a target
    allowed  bool [B, 1, L, L]: what each row sees
    labels   int64 [B, L]: text to predict (at the same position, before any shift), -100 elsewhere
    """

    src: Tensor
    image: slice | None
    allowed: Tensor
    labels: Tensor | None = None


def framed(text: list[int], v: Vocabulary, budget: int) -> list[int]:
    """bos text eos, cut so that it fits the budget and still ends in eos."""
    ids = [v.bos, *text, v.eos]
    return ids if len(ids) <= budget else [*ids[: budget - 1], v.eos]


def t2i(texts: list[list[int]], v: Vocabulary, slots: int, image_tokens: int) -> Sequence:
    """Text to image; an empty text is the unconditional prompt. `slots` text tokens besides t2i."""
    rows, pads = [], []
    for text in texts:
        ids = [v.t2i, *framed(text, v, slots)]
        pads.append(slots + 1 - len(ids))
        rows.append([v.pad] * pads[-1] + ids + [v.soi] + [v.mask] * image_tokens + [v.eoi])
    soi = slots + 1
    length = len(rows[0])
    p = torch.tensor(pads)[:, None, None]
    q, k = _grid(length)
    allowed = (k <= q) & ((k >= p) | (q < p)) | (q >= soi) & (k >= p)
    return Sequence(torch.tensor(rows), slice(soi + 1, soi + 1 + image_tokens), allowed[:, None])


def i2t_vq(texts: list[list[int]], labels: list[list[int]], v: Vocabulary, codes: Tensor) -> Sequence:
    """Conversation about an image given as codes [B, N]; texts are already framed by bos."""
    n = codes.shape[1]
    before = torch.tensor([v.mmu, v.soi]).expand(len(texts), -1)
    after = torch.full((len(texts), 1), v.eoi)
    text, label = _right_padded(texts, v.pad), _right_padded(labels, IGNORE)
    src = torch.cat((before, codes.cpu() + v.offset, after, text), dim=1)
    q, k = _grid(src.shape[1])
    allowed = ((k <= q) | (k <= n + 2)).expand(len(texts), 1, -1, -1)
    return Sequence(src, None, allowed, torch.cat((torch.full((len(texts), n + 3), IGNORE), label), dim=1))


def i2t_clip(texts: list[list[int]], labels: list[list[int]], v: Vocabulary, system: list[int], visual: int) -> Sequence:
    """Conversation about an image given as `visual` rows of h_v."""
    h_v = list(range(-1, -1 - visual, -1))
    head = [v.mmu, *system, v.soi, *h_v, v.eoi]
    first = 2 + len(system)
    text, label = _right_padded(texts, v.pad), _right_padded(labels, IGNORE)
    src = torch.cat((torch.tensor(head).expand(len(texts), -1), text), dim=1)
    q, k = _grid(src.shape[1])
    allowed = ((k <= q) | (k >= first) & (k < first + visual)).expand(len(texts), 1, -1, -1)
    return Sequence(src, None, allowed, torch.cat((torch.full((len(texts), len(head)), IGNORE), label), dim=1))


def reca_clip(templates: list[list[int]], v: Vocabulary, slots: int, visual: int, image_tokens: int) -> Sequence:
    """Template after `visual` rows of h_v. Raises ValueError for a template over the slots."""
    rows = []
    for number, template in enumerate(templates):
        head = [v.mmu, v.soi, *range(-1, -1 - visual, -1), v.eoi, v.bos, *template, v.eos]
        if len(head) > slots + visual:
            raise ValueError(
                f"template {number} has {len(template)} tokens; model.reca_slots={slots} leaves room for {slots - 5}"
            )
        head += [v.pad] * (slots + visual - len(head))
        rows.append(head + [v.soi] + [v.mask] * image_tokens + [v.eoi])
    src = torch.tensor(rows)
    start = slots + visual + 1
    q, k = _grid(src.shape[1])
    of_image = lambda i: (i >= start) & (i < start + image_tokens)  # noqa: E731
    allowed = (k <= q) | (k >= 2) & (k < 2 + visual) | of_image(q) & of_image(k)
    allowed = allowed & (src != v.pad)[:, None, :]
    return Sequence(src, slice(start, start + image_tokens), allowed[:, None])


def reca_vq(templates: list[list[int]], v: Vocabulary, slots: int, condition: Tensor, image_tokens: int) -> Sequence:
    """Template after condition codes [B, G]. Raises ValueError for a template over the slots."""
    rows, pads = [], []
    for number, (template, codes) in enumerate(zip(templates, (condition + v.offset).tolist(), strict=True)):
        text = [v.bos, *template, v.eos]
        pads.append(slots - len(text))
        if pads[-1] < 1:
            raise ValueError(
                f"template {number} has {len(template)} tokens; model.text_slots={slots} leaves room for {slots - 3}"
            )
        head = [v.pad] * pads[-1] + [v.mmu, v.soi, *codes, v.eoi, *text]
        rows.append(head + [v.soi] + [v.mask] * image_tokens + [v.eoi])
    src = torch.tensor(rows)
    given = condition.shape[1]
    soi = slots + given + 3
    p = torch.tensor(pads)[:, None, None]
    q, k = _grid(src.shape[1])
    end = p + given + 2  # of the condition, eoi included
    causal = (k <= q) & ((k >= p) | (q < p))
    allowed = causal | (q > p) & (q <= end) & (k >= p) & (k <= end) | (q >= soi) & (k >= p)
    return Sequence(src, slice(soi + 1, soi + 1 + image_tokens), allowed[:, None])


def template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return encode(tokenizer, f"USER: \n {text} ASSISTANT:")


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return encode(tokenizer, f"USER: \n{text} ASSISTANT:")


def conversation(tokenizer: PreTrainedTokenizerBase, turns: list, v: Vocabulary, budget: int) -> tuple[list, list]:
    """Ids and labels of the turns; only answers and the eos behind each are learned. Cut to the budget."""
    ids, labels = [], []
    for i, (asked, answered) in enumerate(turns):
        before = question(tokenizer, asked) if i == 0 else encode(tokenizer, f"USER: {asked} ASSISTANT:")
        answer = [*encode(tokenizer, f" {answered}"), v.eos]
        ids += before + answer
        labels += [IGNORE] * len(before) + answer
    return ids[:budget], labels[:budget]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _grid(length: int) -> tuple[Tensor, Tensor]:
    """Query rows [1, L, 1] and key columns [1, 1, L]."""
    index = torch.arange(length)
    return index[None, :, None], index[None, None, :]


def _right_padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
