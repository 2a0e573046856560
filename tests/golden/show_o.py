"""What the tests of the two Show-o formats share: the model in its published folders, recorded rng, comparisons."""

from pathlib import Path

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.base import LossTerm
from reca.models.common.exporting import export_to
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.show_o import Adapter, prompt
from reca.models.show_o.conditioner import ClipConditioner
from reca.models.show_o.loss import Prepared, compute_loss
from reca.models.show_o.weights import FILES
from reca.rng import CounterRNG, RandomStream
from reca_kernels.attention.reference import allowed as allowed_keys
from tests.golden.conftest import Golden

LOGITS = 2e-5  # tolerance that cases.json states for fp32 on a CPU
FEATURES = 2e-6  # of the largest value: the public code attends eagerly in CLIP, we with fused kernels
GRADIENT = 1e-5  # relative, of an L2 norm


def write_folders(folder: Path, published: dict, model: dict, codec: dict, clip: dict, text_tokens: int) -> Path:
    """The tensors as published folders. The texts of golden data are numbers: token k is the word `k`."""
    with export_to(folder) as out:
        for part, config, state in (("", published, model), ("codec/", {}, codec), ("clip/", {}, clip)):
            out.tensors(f"{part}{FILES[0]}", state)
            out.json(f"{part}config.json", config)
        out.done()
    words = [str(i) for i in range(1, text_tokens - 1)]  # 0 is the unknown word, the last token ends texts
    word_tokenizer(words, [prompt.END_OF_TEXT]).save_pretrained(folder / "tokenizer")
    return folder


def clip(model: Adapter) -> ClipConditioner:
    """CLIP in front of the sequence, whatever the configuration says."""
    return ClipConditioner(model.config, model.image_tokens, model.clip)


def predicted(model: Adapter, batch: Batch, rng: CounterRNG) -> prompt.Layout:
    """The sequences of a batch with its images, as the loss sees them."""
    prepared = model.prepare(batch, rng)
    return prompt.apply_mask(prepared.layout, batch.features["codes"], prepared.masked, model.vocabulary)


def mean(term: LossTerm) -> Tensor:
    return term.sum / term.weight


def mean_loss(model: Adapter, layout: prompt.Layout, h_v: Tensor | None = None) -> Tensor:
    """The loss of the labels in a layout."""
    weight = float((layout.labels != -100).sum())
    return mean(compute_loss(model, Prepared("i2t", 0, weight, layout), {"h_v": h_v}))


class Recorded(CounterRNG):
    """Uniform numbers of golden data in place of counter-based ones: purpose -> [B] or [B, n]."""

    def __init__(self, **tables: Tensor):
        super().__init__(0)
        self.tables = {RandomStream[name.upper()]: table for name, table in tables.items()}

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        return self.tables[purpose][sample_ids].reshape(len(sample_ids), n)


def recorded(golden: Golden, case: str) -> Recorded:
    """The masking draws of a case of the format `show_o`."""
    tables = {"mask_rate": golden.data[f"{case}.rand_t"], "mask_order": golden.data[f"{case}.rand_scores"]}
    if f"{case}.rand_drop" in golden.data:
        tables["condition_drop"] = golden.data[f"{case}.rand_drop"]
    return Recorded(**tables)


def ids(texts: list[str]) -> list[list[int]]:
    return [[int(word) for word in text.split()] for text in texts]


def stripped(rows: Tensor, pad: int) -> list[list[int]]:  # int64 [B, L]
    """Rows without the padding on their right."""
    return [row[: max(i for i, token in enumerate(row) if token != pad) + 1] for row in rows.tolist()]


def kept(layout: prompt.Layout) -> list[tuple[Tensor, Tensor]]:
    """Per sample, the rows of ours that are no padding, and the positions they have in the release's sequence."""
    found = []
    for row, runs in enumerate(layout.runs):
        first = runs[0].length if runs[0].mode == "pad" else 0
        found.append((torch.arange(first, layout.src.shape[1]), layout.position_ids[row, first:]))
    return found


def same_ids(layout: prompt.Layout, wanted: Tensor, v: prompt.Vocabulary, visual: int = 0) -> None:
    """Our rows hold the release's ids, which are PAD wherever we hold nothing; h_v (`visual` rows) is -100 there."""
    for sample, (rows, positions) in enumerate(kept(layout)):
        ours = torch.full_like(wanted[sample], v.pad)
        ours[positions] = layout.src[sample, rows].long()
        h_v = ours < 0
        assert ours[h_v].tolist() == list(range(-1 - sample * visual, -1 - (sample + 1) * visual, -1))
        assert torch.equal(torch.where(h_v, -100, ours), wanted[sample])


def same_mask(layout: prompt.Layout, allowed: Tensor) -> None:  # [B or 1, 1, L, L]
    """Our rows see the release's keys; the keys that we do not hold are seen by none of them."""
    for sample, (rows, positions) in enumerate(kept(layout)):
        theirs = allowed[sample % len(allowed), 0].bool()[positions]
        ours = allowed_keys(layout.runs[sample])
        assert torch.equal(ours[rows][:, rows], theirs[:, positions])
        assert theirs.sum() == theirs[:, positions].sum()


def same_features(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=0, atol=FEATURES * max(1.0, float(wanted.abs().max())))


def close_rows(ours: Tensor, theirs: Tensor, layout: prompt.Layout, atol: float | None = None) -> None:  # [B, L, ...]
    """Our rows are theirs; atol None: as features."""
    atol = FEATURES * max(1.0, float(theirs.abs().max())) if atol is None else atol
    for sample, (rows, positions) in enumerate(kept(layout)):
        torch.testing.assert_close(ours[sample, rows], theirs[sample, positions], rtol=0, atol=atol)


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norms by published name; 0 where no gradient arrived."""
    trained = ((n, p) for n, p in model.named_parameters() if n.startswith(("showo.", "mm_projector.")))
    return {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in trained}


def same_norms(model: torch.nn.Module, wanted: dict[str, float]) -> None:
    """Every norm of `wanted`; a gradient that is mathematically zero is noise of at most 1e-6."""
    ours = gradient_norms(model)
    assert wanted.keys() <= ours.keys()
    wrong = {n: (ours[n], w) for n, w in wanted.items() if abs(ours[n] - w) > GRADIENT * w + 1e-6 * (w > 0)}
    assert not wrong
