"""The three losses of the released RECA trainer of Show-o: CLIP variant, one joint micro-step, VQGAN variant."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reca.data.batch import Batch
from reca.models.common.patch_codebook import CodebookSizes, PatchCodebook
from reca.models.show_o import Adapter, prompt
from reca.models.show_o.config import ClipSizes, PhiSizes, ShowOConfig
from reca.models.show_o.prompt import image_rows
from tests.golden.show_o import (
    LOGITS,
    Recorded,
    clip,
    close_rows,
    gradient_norms,
    kept,
    mean,
    mean_loss,
    predicted,
    same_features,
    same_ids,
    same_mask,
    same_norms,
    write_folders,
)

CONDITION_DROP = 0.1


def matches(config: dict) -> bool:
    return str(config.get("model", "")).startswith("show-o RecA")


def recipe(config: dict, folder) -> ShowOConfig:
    phi, clip = config["phi"], config["clip"]
    assert clip["select_layer"] == -2 and clip["drop_cls"] and phi["qk_layernorm"]
    grid = math.isqrt(config["num_vq_tokens"])
    return ShowOConfig(
        weights=str(folder),
        phi=PhiSizes(**{name: phi[name] for name in PhiSizes.__dataclass_fields__ if name in phi}),
        clip=ClipSizes(**{name: clip[name] for name in ClipSizes.__dataclass_fields__}),
        codec="patches",  # the codes are given
        patches=CodebookSizes(config["resolution"] // grid, config["codebook_size"]),
        parity=True,
        image_size=config["resolution"],
        max_text_tokens=config["max_seq_length"],
        max_reca_tokens=config["recon_text_slots"],
        caption_drop=CONDITION_DROP,
    )


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    config = golden.config
    published = {"w_clip_vit": True} | {
        key: config[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "mask_token_id")
    }
    given = recipe(config, tmp_path_factory.mktemp("reca_show_o"))
    write_folders(
        folder=Path(given.weights),
        published=published,
        model={**part(golden, "showo."), **part(golden, "mm_projector.")},
        codec=PatchCodebook(given.patches).state_dict(),
        clip=golden.part("clip."),
        text_tokens=config["llm_vocab_size"],
    )
    return Adapter.load(given)


def part(golden, prefix: str) -> dict:
    return {key: value for key, value in golden.weights.items() if key.startswith(prefix)}


@pytest.fixture
def model(loaded, monkeypatch):
    monkeypatch.setattr(prompt, "TEMPLATE", "{}")
    config = loaded.config
    loaded.zero_grad()
    yield loaded
    loaded.config = config


def words(rows: torch.Tensor) -> list[str]:
    """Texts of golden token ids, which end at the first -1."""
    return [" ".join(str(i) for i in row if i >= 0) for row in rows.tolist()]


def seen_by_clip(pixels, model):
    return F.interpolate(pixels, [model.config.clip.image_size] * 2, mode="bilinear")


def same_loss(ours, wanted) -> None:
    torch.testing.assert_close(ours.detach(), wanted[0], rtol=0, atol=2e-6)


def norms_of(golden, case: str) -> dict[str, float]:
    prefix = f"{case}.grad_norm."
    return {k.removeprefix(prefix): float(t) for k, t in golden.data.items() if k.startswith(prefix)}


def clip_case(golden, model):
    data = golden.data
    features = {"codes": data["clip.codes"], "h_v": data["clip.clip_features"]}
    ids = torch.arange(len(data["clip.codes"]))
    batch = Batch("reca", ids, words(data["clip.text_ids"]), features=features)
    return batch, Recorded(mask_rate=data["clip.u"], mask_order=data["clip.perm"])


@torch.no_grad()
def test_clip_h_v(golden, model):
    data = golden.data
    features = clip(model).encode_understanding(clip(model).reca_pixels(data["clip.pixel_values"]))
    same_features(features, data["clip.clip_features"])
    same_features(model.visual(features), data["clip.h_v"])


@torch.no_grad()
def test_clip_sequence_and_logits(golden, model):
    data, n = golden.data, image_rows(model.image_tokens)
    batch, rng = clip_case(golden, model)
    layout, features = predicted(model, batch, rng), batch.features
    same_ids(layout, data["clip.input_ids"], model.vocabulary, clip(model).tokens())
    same_mask(layout, data["clip.visible"][:, None])
    assert torch.equal(layout.labels[:, n], data["clip.labels"][:, n])
    sums = model.embed(layout.src, features["h_v"]).sum(-1)
    close_rows(sums, data["clip.input_embeds_sum"], layout)
    logits = model.showo.lm_head(model.hidden(layout, features["h_v"])[:, n])
    torch.testing.assert_close(logits, data["clip.logits"], rtol=0, atol=LOGITS)


def test_clip_loss_and_gradients(golden, model):
    batch, rng = clip_case(golden, model)
    term = model(batch, rng)
    assert term.weight == model.prepare(batch, rng).weight
    same_loss(mean(term), golden.data["clip.loss_recon"])
    mean(term).backward()
    same_norms(model, norms_of(golden, "clip"))
    untouched = [n for n, norm in gradient_norms(model).items() if norm == 0]
    assert {n.split(".")[0] for n in untouched if "embed_tokens" not in n} == {"mm_projector"}
    assert "showo.model.embed_tokens.weight" in untouched


def t2i_case(golden):
    data = golden.data
    texts = words(data["joint.t2i_text_ids"])
    rng = Recorded(
        mask_rate=data["joint.t2i_u"], mask_order=data["joint.t2i_perm"], condition_drop=data["joint.t2i_drop_draw"]
    )
    return Batch("t2i", torch.arange(len(texts)), texts, features={"codes": data["joint.t2i_codes"]}), rng


def i2t_layout(golden, model) -> prompt.Layout:
    data, v, samples = golden.data, model.vocabulary, []
    for ids, labels, system in zip(
        *(data[f"joint.mmu_{name}"].tolist() for name in ("text_ids", "text_labels", "system_ids")), strict=True
    ):
        end = max(i for i, token in enumerate(ids) if token != v.pad) + 1
        samples.append(prompt.i2t_clip(ids[:end], labels[:end], v, system, clip(model).tokens()))
    return prompt.layout(samples, v)


@torch.no_grad()
def test_joint_sequences(golden, model):
    data = golden.data
    layout = predicted(model, *t2i_case(golden))
    same_ids(layout, data["joint.t2i_input_ids"], model.vocabulary)
    same_mask(layout, data["joint.t2i_visible"][:, None])
    counted = data["joint.t2i_labels"][:, model.config.max_text_tokens + 1 :]
    assert torch.equal(layout.labels[:, -counted.shape[1] :], counted)

    layout = i2t_layout(golden, model)
    same_mask(layout, data["joint.mmu_visible"][:, None])
    for row, (rows, positions) in enumerate(kept(layout)):
        assert torch.equal(layout.labels[row, rows[:-1]], data["joint.mmu_labels"][row, positions[:-1] + 1])
    features = clip(model).encode_understanding(seen_by_clip(data["joint.mmu_pixels_small"], model))
    close_rows(model.embed(layout.src, features).sum(-1), data["joint.mmu_input_embeds_sum"], layout)
    longest = data["joint.mmu_text_ids"].shape[1]
    system = data["joint.mmu_system_ids"].shape[1]
    assert clip(model).conversation_budget(system) == longest


def test_joint_losses_and_gradients(golden, model):
    """One micro-step of the trainer: 0 * t2i + 1 * i2t + 1 * recon."""
    data, share = golden.data, golden.config["loss_coeff"]
    with torch.no_grad():
        features = clip(model).encode_understanding(seen_by_clip(data["joint.mmu_pixels_small"], model))
    layout = i2t_layout(golden, model)
    losses = {
        "t2i": mean(model(*t2i_case(golden))),
        "i2t": mean_loss(model, layout, features),
        "recon": mean(model(*clip_case(golden, model))),
    }
    for name, loss in losses.items():
        same_loss(loss, data[f"joint.loss_{name}"])
    total = sum(share[name] * loss for name, loss in losses.items())
    same_loss(total, data["joint.loss_total"])
    total.backward()
    same_norms(model, norms_of(golden, "joint"))


def vq_case(golden, model):
    data = golden.data
    codes, given = data["clip.codes"], data["vq.given_codes"]
    model.config = replace(
        model.config,
        hv_source="vq",
        hv_down_scale=math.isqrt(model.image_tokens // given.shape[1]),
        max_text_tokens=golden.config["vq_max_seq_length"],
    )
    width = data["vq.input_ids"].shape[1]
    text = width - (3 + given.shape[1]) - (codes.shape[1] + 2)
    first = (data["vq.input_ids"] != model.vocabulary.pad).int().argmax(1)
    texts = []
    for row, start in zip(data["vq.input_ids"].tolist(), first.tolist(), strict=True):
        behind = start + 3 + given.shape[1]  # mmu soi codes eoi
        texts.append(" ".join(map(str, row[behind + 1 : text + 3 + given.shape[1] - 1])))  # without bos and eos
    offset = model.vocabulary.offset
    image = data["vq.input_ids"][:, image_rows(model.image_tokens)]
    codes = (
        torch.where(image == model.vocabulary.mask, data["vq.labels"][:, image_rows(model.image_tokens)], image)
        - offset
    )
    batch = Batch("reca", torch.arange(len(texts)), texts, features={"codes": codes, "h_v": given})
    rng = Recorded(mask_rate=data["vq.u"], mask_order=data["vq.perm"])
    return batch, rng


@torch.no_grad()
def test_vq_sequence_and_logits(golden, model):
    data, n = golden.data, image_rows(model.image_tokens)
    batch, rng = vq_case(golden, model)
    layout, features = predicted(model, batch, rng), batch.features
    same_mask(layout, data["vq.visible"][:, None])
    assert torch.equal(layout.labels[:, n], data["vq.labels"][:, n])
    logits = model.showo.lm_head(model.hidden(layout, features["h_v"])[:, n])
    torch.testing.assert_close(logits, data["vq.logits"], rtol=0, atol=LOGITS)
    layout.src[layout.src < 0] = (features["h_v"] + model.vocabulary.offset).flatten().int()
    same_ids(layout, data["vq.input_ids"], model.vocabulary)


def test_vq_loss_and_gradients(golden, model):
    batch, rng = vq_case(golden, model)
    term = model(batch, rng)
    assert term.weight == model.prepare(batch, rng).weight
    same_loss(mean(term), golden.data["vq.loss_recon"])
    mean(term).backward()
    same_norms(model, norms_of(golden, "vq"))
