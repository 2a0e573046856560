"""BAGEL against the public code: preprocessing, understanding, codec, losses, gradients, sampling, editing, answers."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from reca.data.batch import Batch
from reca.data.transforms import bound_size, make_view
from reca.models.bagel import Adapter, loss, modules, prompt, sampling
from reca.models.bagel.transformer import GEN
from reca.models.bagel.views import edit_views
from reca.models.bagel.weights import published_parts
from reca.models.common.images import fit_to_view
from reca.optim import freeze
from reca.rng import CounterRNG
from reca_kernels import flow_matching_add_noise, flow_matching_loss, masked_linear_cross_entropy
from tests.golden.bagel import (
    LOSS,
    Packed,
    Record,
    Recorded,
    close,
    config,
    crop,
    passes,
    same_loss,
    seen,
    view,
    write_folder,
    wrong_norms,
)  # fmt: skip
from tests.golden.pillow import LEVELS, needs_recorded_pixels


def matches(config: dict) -> bool:
    return "llm_config" in config and "max_latent_size" in config


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    return Adapter.load(config(golden, write_folder(golden, tmp_path_factory.mktemp("bagel"))))


@pytest.fixture
def clean(model):
    """Everything trained, no gradients, the recipe's shift."""
    model.requires_grad_(True)
    model.zero_grad()
    model.config.timestep_shift = 1.0
    return model


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


# pixels


def test_sizes(golden):
    for row in golden.cases["values"]["resize_table"]:
        rule = view(row | {"image_stride": row["stride"]}, row["max_pixels"])
        assert list(bound_size(*row["in_wh"], rule)) == row["out_wh"], row


def test_preprocessing(golden, model):
    c, data = golden.config, golden.data
    numbers = [int(name.rsplit(".", 1)[1]) for name in data if name.startswith("pre.image_u8.")]
    for i in numbers:
        image = Image.fromarray(data[f"pre.image_u8.{i}"].numpy())
        for name in ("vit", "vae"):
            pixels = make_view(image, view(c[f"{name}_transform"])) / 127.5 - 1
            close(pixels, data[f"pre.{name}_tensor.{i}"], LEVELS / 127.5)
        assert torch.equal(make_view(image, model.views("reca").gen), make_view(image, view(c["vae_transform"])))
        assert torch.equal(make_view(image, edit_views(model).und), make_view(image, view(c["vit_transform"])))


def test_positions(golden):
    call = golden.cases["tensors"]["pos.extrapolate"]["call"]  # …(height, width, pixels of a token, side of the table)
    height, width, pixels, side = map(int, re.findall(r"\d+", call))
    assert torch.equal(prompt.grid(height // pixels, width // pixels, side), golden.data["pos.extrapolate"])


def test_position_tables(golden, model):
    for name in ("latent_pos_embed", "vit_pos_embed"):
        ours, wanted = getattr(model, name).pos_embed, golden.weights[f"{name}.pos_embed"]
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=0)


@needs_recorded_pixels
def test_understanding(golden, model):
    data, patch = golden.data, golden.config["vit_config"]["patch_size"]
    order = golden.cases["values"]["reca.vit_image_order"]
    images = [data[f"pre.vit_tensor.{i}"] for i in order]
    close(torch.cat([modules.patchify(image, patch) for image in images]), data["vit.packed_tokens"])
    rows = seen(golden, model, order)
    assert [row.shape[0] * row.shape[1] for row in rows] == data["vit.seqlens"].tolist()
    close(torch.cat([row.flatten(0, 1) for row in rows]), data["vit.out"])
    bridged = model.connect(rows)
    close(bridged, data["vit.connector_out"])
    side = modules.vit_size(model.config.vision)
    at = torch.cat([prompt.grid(*row.shape[:2], side) for row in rows])
    assert torch.equal(at, data["vit.position_ids"])
    close(bridged + model.vit_pos_embed.pos_embed[at], data["vit.h_v"])


def test_codec(golden, model):
    data = golden.data
    with torch.no_grad():
        close(model.codec.encode(data["vae.padded_images"]), data["vae.moments"])
        close(model.codec.latents(data["vae.moments"], data["vae.posterior_noise"]), data["vae.latent"])
        close(model.codec.decode(data["vae.latent"]), data["vae.decoded"])


# reconstruction


@pytest.fixture
def reca(golden, model):
    """The batch of three, its features and its rng."""
    data, values, patch = golden.data, golden.cases["values"], golden.config["latent_patch_size"]
    sizes = values["reca.vae_latent_shapes"]
    texts = [words(ids) for ids in values["reca.text_ids"]]
    order = values["reca.vae_image_order"]
    moments = [crop(data["vae.moments"][i], size, patch) for i, size in zip(order, sizes, strict=True)]
    posterior = [crop(data["vae.posterior_noise"][i], size, patch) for i, size in zip(order, sizes, strict=True)]
    gaussians, drop = values["reca.timestep_gaussians"], values["reca.text_dropout_uniforms"]
    rng = Recorded(gaussians, posterior, data["reca.noise"], drop)
    model.config.template_drop = values["reca.text_dropout_prob"]
    return Batch("reca", torch.arange(len(sizes)), texts), moments, rng, sizes


def whole_samples(model, reca, h_v):
    batch, moments, rng, sizes = reca
    samples = loss.prepare(model, replace(batch, features={"h_v": h_v, "moments": moments}), rng).items
    return [[*items, prompt.NoisyImage(*size)] for items, size in zip(samples, sizes, strict=True)]


def same_pack(golden, model, packed: Packed, case: str):
    """Ids, places, positions and who sees whom."""
    data = golden.data
    assert packed.length == golden.cases["values"][f"{case}.sequence_length"]
    src = packed.und("src")
    names = ("text_indexes", "vit_token_indexes", "vae_token_indexes")
    text, vit, vae = (data[f"{case}.packed_{name}"] for name in names)
    assert torch.equal(src[text].long(), data[f"{case}.packed_text_ids"])
    assert bool((src[vit] < 0).all())
    assert sorted(packed.where["prefix", GEN] + packed.where["picture", GEN]) == vae.tolist()
    assert packed.where["picture", GEN] == data[f"{case}.mse_loss_indexes"].tolist()
    assert torch.equal(packed.und("vit_positions")[vit], data[f"{case}.packed_vit_position_ids"])
    assert torch.equal(packed.gen("latent_positions")[vae], data[f"{case}.packed_latent_position_ids"])
    assert torch.equal(packed.positions(), data[f"{case}.packed_position_ids"])
    for i, ours in enumerate(packed.allowed()):
        assert torch.equal(ours, data[f"{case}.attn_allowed.{i}"].bool()), i


def test_reca_sequence(golden, model, reca):
    h_v = seen(golden, model, golden.cases["values"]["reca.vit_image_order"])
    same_pack(golden, model, Packed(model, whole_samples(model, reca, h_v)), "reca")


@needs_recorded_pixels
@pytest.mark.parametrize("case", ["full", "frozen", "frozen_shift3"])
def test_reca_loss_and_every_stage_of_it(golden, clean, reca, case):
    model, data, values = clean, golden.data, golden.cases["values"]
    batch, moments, rng, _ = reca
    if case != "full":
        freeze(model, None)
    model.config.timestep_shift = 3.0 if case == "frozen_shift3" else 1.0
    h_v = seen(golden, model, values["reca.vit_image_order"])
    with Record(model) as record:
        term = model(replace(batch, features={"h_v": h_v, "moments": moments}), rng)
    same_loss(term.sum / term.weight, data[f"reca.{case}.loss"])
    cached = replace(batch, features={"h_v": h_v, "moments": moments})
    assert float(term.weight) == len(data["reca.noise"]) == model.prepare(cached, rng).weight

    packed = Packed(model, whole_samples(model, reca, h_v))
    v = model.llm2vae(record.seen["hidden"][1][GEN])
    close(v, data["reca.frozen_shift3.v_pred" if case == "frozen_shift3" else "reca.v_pred"])
    if case != "frozen_shift3":
        drawn = loss.sample_posterior(model, moments, rng, batch.sample_ids)
        patch = model.config.latent_patch_size
        close(torch.cat([modules.patchify(z, patch) for z in drawn]), data["reca.latent_clean"])
        close(loss.noise_level(model, rng, batch.sample_ids), torch.tensor(values["reca.t_shift1"]))
        close(record.packed("input", packed), data["reca.packed_embed"])
        for i in range(golden.config["llm_config"]["num_hidden_layers"]):
            close(record.packed(f"layer {i}", packed), data[f"reca.layer_out.{i}"])
        close(record.packed("hidden", packed), data["reca.last_hidden"])
        close((v - (data["reca.noise"] - data["reca.latent_clean"])).square(), data["reca.mse"])

    (term.sum / term.weight).backward()
    assert not wrong_norms(model, values[f"reca.{case}.grad_norms"])
    parameters = dict(model.named_parameters())
    for name, wanted in data.items():
        if name.startswith(f"reca.{case}.grad."):
            ours = parameters[name.removeprefix(f"reca.{case}.grad.")].grad
            assert float((ours - wanted).norm()) <= LOSS * float(wanted.norm()), name
    touched = {n for n, p in parameters.items() if p.grad is not None}
    if case == "frozen":  # no graph at all for what the release keeps by multiplying with zero
        assert not touched & set(values["reca.frozen.params_without_grad"] + values["reca.frozen.params_zero_grad"])
    if case == "full":
        untouched = set(values["reca.full.params_zero_or_no_grad"]) & parameters.keys()
        assert not [n for n in untouched if parameters[n].grad is not None and bool(parameters[n].grad.any())]


def test_cached_prefix_equals_the_packed_pass(golden, model, reca):
    data, values = golden.data, golden.cases["values"]
    h_v = seen(golden, model, values["reca.vit_image_order"])[:1]
    items = whole_samples(model, reca, h_v * len(reca[0]))[0]
    size = values["reca.vae_latent_shapes"][0]
    with torch.no_grad():
        _, cache = model.prefill(prompt.Prompt([items[:-1]], h_v))
        image = model.layout([[prompt.NoisyImage(*size)]], cache.positions)
        v = model.predict_velocity(cache, image, data["recon.x_t"], torch.tensor([values["recon.t"]]))
    close(v, data["recon.v"])
    close(v, data["reca.v_pred"][: len(v)])


# text to image, image to text and editing in one pack


@needs_recorded_pixels
def test_mixed_losses_and_gradients(golden, clean):
    model, data, values, patch = clean, golden.data, golden.cases["values"], golden.config["latent_patch_size"]
    order, sizes = values["mixed.vae_image_order"], [tuple(size) for size in values["mixed.vae_latent_shapes"]]
    padded = model.codec.latents(data["vae.moments"][order], data["mixed.posterior_noise"])
    close(padded, data["mixed.padded_latent"])
    latents = [crop(z, size, patch) for z, size in zip(padded, sizes, strict=True)]

    h_v = seen(golden, model, values["mixed.vit_image_order"])
    looks = [prompt.VitImage(*rows.shape[:2]) for rows in h_v]
    caption, asked, answered, instruction = values["mixed.text_ids"]
    caption, instruction = (prompt.add_bos_eos(ids, model.vocabulary) for ids in (caption, instruction))
    samples = [
        [caption, prompt.NoisyImage(*sizes[0])],
        [looks[0], prompt.conversation([(asked, answered)], model.vocabulary)],
        [prompt.CleanImage(*sizes[1]), looks[1], instruction, prompt.NoisyImage(*sizes[2])],
        [prompt.DroppedImage(), looks[2], caption, prompt.NoisyImage(*sizes[3])],
    ]
    packed = Packed(model, samples)
    same_pack(golden, model, packed, "mixed")
    labels = packed.und("labels")
    assert torch.equal(labels[data["mixed.ce_loss_indexes"]], data["mixed.packed_label_ids"])
    assert sorted(set((labels >= 0).nonzero()[:, 0].tolist())) == sorted(data["mixed.ce_loss_indexes"].tolist())

    drawn = [latents[i] for i in (0, 2, 3)]
    t = torch.tensor(values["mixed.timestep_gaussians"]).sigmoid()
    raw = data["mixed.packed_timesteps"]
    noise = data["mixed.noise"][raw.isfinite()]  # clean images get no noise
    tokens = flow_matching_add_noise(drawn, t, noise, patch=patch)
    parts = passes(samples)
    with Record(model) as record:
        hidden, cache = model.prefill(prompt.Prompt(parts["prefix"], h_v, [latents[1]]))
        v = model.predict_velocity(cache, model.layout(parts["picture"], cache.positions), tokens, t)
    close(record.packed("input", packed), data["mixed.packed_embed"])
    close(record.packed("hidden", packed), data["mixed.last_hidden"])
    target = noise - torch.cat([modules.patchify(z, patch) for z in drawn])
    close((v - target).square(), data["mixed.mse"])
    mse = flow_matching_loss(v, drawn, t, noise, patch=patch)
    same_loss(mse, data["mixed.mse_loss"])
    own = packed.layouts["prefix"].labels
    head = model.language_model.lm_head.weight
    close(masked_linear_cross_entropy(hidden, head, own, reduction="none")[own >= 0], data["mixed.ce"])
    ce = masked_linear_cross_entropy(hidden, head, own)
    same_loss(ce, data["mixed.ce_loss"])
    same_loss(mse + ce, data["mixed.loss"])
    (mse + ce).backward()
    assert not wrong_norms(model, values["mixed.grad_norms"])


@needs_recorded_pixels
def test_answer_loss_is_the_mixed_packs(golden, model):
    """The second sample of the pack, by itself, through the adapter's own loss."""
    data, values = golden.data, golden.cases["values"]
    h_v = seen(golden, model, values["mixed.vit_image_order"][:1])
    _, asked, answered, _ = values["mixed.text_ids"]
    batch = Batch("i2t", torch.tensor([0]), [[(words(asked), words(answered))]], features={"h_v": h_v})
    term = model(batch, CounterRNG(0))
    same_loss(term.sum, data["mixed.ce"].sum())
    assert float(term.weight) == model.prepare(batch, CounterRNG(0)).weight == len(data["mixed.ce"])


# inference


def sampled(golden, model, case, x, caches):
    """Every Euler step of a case, and the decoded image."""
    data, s = golden.data, golden.cases["values"][f"{case}.settings"]
    height, width = (side // model.token_side for side in s["image_hw"])
    steps = []
    out = sampling.denoise(
        model, x, [(height, width)], *caches, steps=s["num_timesteps"], guidance=s["cfg_text_scale"],
        image_guidance=s["cfg_img_scale"], interval=s["cfg_interval"], renorm=s["cfg_renorm_type"],
        renorm_min=s["cfg_renorm_min"], shift=s["timestep_shift"], on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    t, x_steps, v_steps = (torch.stack(parts) for parts in zip(*steps, strict=True))
    close(t, data[f"{case}.timesteps"])
    close(v_steps, data[f"{case}.v_steps"])
    close(x_steps, data[f"{case}.x_steps"])
    with torch.no_grad():
        image = model.codec.decode(modules.unpatchify(out, height, width, model.config.latent_patch_size)[None])
    close(image, data[f"{case}.decoded"])


@pytest.mark.parametrize("case", ["t2i.nocfg", "t2i.cfg4"])
@torch.no_grad()
def test_text_to_image(golden, model, case):
    data = golden.data
    _, full = model.prefill(prompt.Prompt([[model.text(words(golden.cases["values"]["t2i.text_ids"]))]]))
    close(full.layers[0][0], data["t2i.kv.k0"])
    close(full.layers[-1][1], data["t2i.kv.v_last"])
    sampled(golden, model, case, data["t2i.init_noise"], (full, model.empty_cache(1), None))


@pytest.mark.parametrize("renorm", ["text_channel", "global", "channel"])
@torch.no_grad()
def test_editing(golden, model, renorm):
    data, values = golden.data, golden.cases["values"]
    source = data["edit.source_u8"].permute(2, 0, 1)
    raw = [tensor.permute(2, 0, 1) for name, tensor in data.items() if name.startswith("pre.image_u8.")]
    assert any(torch.equal(fit_to_view(image, edit_views(model).gen), source) for image in raw)
    full, textless, imageless, sizes = sampling.edit_caches(
        model, [source], [words(values["edit.text_ids"])], list(data["edit.posterior_noise"])
    )
    assert sizes == [tuple(side // model.token_side for side in source.shape[1:])]
    for cache, name in ((textless, "after_image"), (full, "full"), (imageless, "cfg_img")):
        wanted = values[f"edit.context_{name}"]
        assert [len(cache.layers[0][0])] == cache.lengths == wanted["kv_lens"] and cache.positions == wanted["ropes"]
    ours, kept = full.layers[0][0], data["edit.kv.k0"]
    n = sizes[0][0] * sizes[0][1]
    moved = torch.cat((ours[:1], ours[2 : n + 2], ours[1:2], ours[n + 2 :]))  # ours: both borders, then the latents
    close(moved, kept)
    sampled(golden, model, f"edit.{renorm}", data["edit.init_noise"], (full, textless, imageless))


@torch.no_grad()
def test_answering(golden, model):
    data, text = golden.data, golden.cases["values"]["vqa.text_ids"]
    number = re.search(r"image (\d+)", golden.cases["tensors"]["vqa.tokens"]["meaning"])[1]
    h_v = seen(golden, model, [int(number)])
    _, cache = model.prefill(prompt.Prompt([[prompt.VitImage(*h_v[0].shape[:2]), model.text(words(text))]], h_v))
    logits: list[torch.Tensor] = []
    tokens = sampling.greedy(model, cache, len(data["vqa.tokens"]), logits.append)
    assert data["vqa.tokens"][0] == model.vocabulary.bos
    assert tokens[0, : len(data["vqa.tokens"]) - 1].tolist() == data["vqa.tokens"][1:].tolist()
    close(torch.cat(logits), data["vqa.logits"][: len(logits)])


def test_every_published_name_is_loaded(golden, model):
    ours = published_parts(model).state_dict()
    assert ours.keys() == golden.weights.keys()
    for name, tensor in ours.items():
        assert name.endswith("pos_embed") or torch.equal(tensor, golden.weights[name]), name
