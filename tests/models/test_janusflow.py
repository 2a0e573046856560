"""What is special about JanusFlow: its file and its autoencoder's, dropped conditions, K/V of prompts that are kept."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca.data.batch import Batch
from reca.models.janus import prompt as janus_prompt
from reca.models.janusflow import Adapter, prompt, sampling, weights
from reca.rng import CounterRNG
from reca_kernels import TextSegment, VisualSegment
from tests.models.config_files import LANGUAGE, change_size
from tests.models.contract import batch, load, shared


@pytest.fixture(scope="module")
def model():
    return shared("janusflow vae")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("export")
    model.export(made)
    return made


def again(model, folder, **changes):
    return Adapter.load(replace(model.config, weights=str(folder), words=[], **changes)).eval()


# files


def test_the_file_has_deepseeks_names_and_no_autoencoder(model, folder):
    names = load_file(folder / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {
        "beg_of_und_embed", "language_model", "vision_gen_dec_aligner", "vision_gen_dec_aligner_norm",
        "vision_gen_dec_model", "vision_gen_enc_aligner", "vision_gen_enc_model", "vision_und_enc_aligner",
        "vision_und_enc_model",
    }  # fmt: skip
    assert {"vision_gen_enc_model.mid_block.res_blocks.0.cond_embeds_mapper.weight",
            "vision_gen_dec_model.out_convs.0.unpatch_conv.bias"} <= names  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    params = written["vision_gen_dec_config"]["params"]
    assert params["upsamples"] == 1 and params["out_channels"] == model.codec.channels
    assert json.loads((folder / "vae/config.json").read_text())["scaling_factor"] == 0.13025


def test_an_autoencoder_of_its_own_folder_is_read_and_not_written_again(model, folder, tmp_path):
    """Old files of diffusers name the projections of attention otherwise."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "vae" / weights.CODEC)
    for new, name in old.items():
        state = {n.replace(f".{new}.", f".{name}."): tensor for n, tensor in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, tmp_path / weights.CODEC)
    loaded = again(model, folder, codec_weights=str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(name.startswith("vae") for name in loaded.export(tmp_path / "out"))


def test_what_does_not_fit_is_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match=r"makes it 3 \(model.generation.encoder_blocks\)"):
        again(model, folder, generation=replace(model.config.generation, encoder_blocks=3))
    with pytest.raises(ValueError, match=r"_factor is 0.13025, but the recipe makes it 0.2 \(model.autoencoder.scal"):
        again(model, folder, autoencoder=replace(model.config.autoencoder, scaling_factor=0.2))
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"contains no \S+; set model.codec_weights, such as .*stabilityai/sdxl-vae"):
        again(model, tmp_path)


UVIT = ("hidden_size", "block_out_channels", "layers_in_middle", "norm_eps")
SIZES = [f"language_config.{key}" for key in LANGUAGE]
SIZES += [f"vision_gen_enc_config.params.{key}" for key in (*UVIT, "input_channels")]
SIZES += [f"vision_gen_dec_config.params.{key}" for key in (*UVIT, "out_channels")]


@pytest.mark.parametrize("place", [*SIZES, "vision_und_enc_config.params.image_size"])
def test_every_size_of_a_published_file_is_compared_with_the_recipe(folder, tmp_path, place):
    """Some would load: heads and epsilons have no tensor."""
    change_size(folder, place, tmp_path)
    with pytest.raises(ValueError, match=rf"config.json does not fit the recipe: {place} is .* \(model\.\w+\.\w+\)"):
        weights.check_files(tmp_path, shared("janusflow vae").config)


def test_pixels_that_are_not_normalised_are_reported_unless_the_tower_has_its_mean(folder, tmp_path, caplog):
    preprocessor = json.loads((folder / weights.PREPROCESSOR).read_text())
    (tmp_path / weights.PREPROCESSOR).write_text(json.dumps(preprocessor | {"do_normalize": False}))
    config = json.loads((folder / "config.json").read_text())
    weights.check_files(tmp_path, shared("janusflow vae").config)
    assert "do_normalize False, but True is used here" in caplog.text
    caplog.clear()
    config["vision_und_enc_config"]["params"]["pixel_mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights.check_files(tmp_path, shared("janusflow vae").config)
    assert not caplog.records


def test_pixels_that_would_be_made_otherwise_are_reported(folder, tmp_path, caplog):
    config = json.loads((folder / "config.json").read_text())
    config["vision_und_enc_config"]["params"]["pixel_mean"] = [0.4, 0.4, 0.4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="reca"):
        weights.check_files(folder, shared("janusflow vae").config)
        assert not caplog.records
        weights.check_files(tmp_path, shared("janusflow vae").config)
    assert "pixel_mean [0.4, 0.4, 0.4], but [0.5, 0.5, 0.5] is used here" in caplog.text


def test_types(folder, model):
    loaded = again(model, folder, dtype="bf16")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.startswith(weights.TRAINED) else torch.float32), name
    term = loaded(batch(loaded, "reca"), CounterRNG(0))
    assert term.sum.dtype == torch.float32 and term.sum.isfinite()


# sequences


def test_what_a_sample_without_its_condition_was_told_does_not_matter(model):
    """But how long it was does: the image keeps its positions."""
    config = model.config
    try:
        model.config = replace(config, reca_drop=1.0)
        sample = batch(model, "reca", (0, 1))
        features = model.encode(sample)
        sums = []
        for texts, h_v in ((["describe the picture", "a"], 0.0), (["what is this", "square"], 1.0)):
            given = features | {"h_v": torch.full_like(features["h_v"], h_v)}
            term = model(replace(sample, text=texts, gen=None, und=None, features=given), CounterRNG(0))
            sums.append(float(term.sum.detach()))
        layout = model.prepare(replace(sample, text=["describe the picture", "a"]), CounterRNG(0)).layout
    finally:
        model.config = config
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)
    assert layout.unseen == tuple(length - model.image_tokens - 2 for length in layout.lengths)
    assert layout.position_ids[:, -1].tolist() == [length - 1 for length in layout.lengths]


def test_long_texts_are_cut_to_the_context(model):
    sample = batch(model, "t2i", (0, 1))
    sample.text = ["a red square " * 40] * 2
    layout = model.prepare(sample, CounterRNG(0)).layout
    assert layout.src.shape[1] == model.config.max_length
    end = [*model.vocabulary.assistant, *model.tokens(":")]
    assert layout.src[0, -model.image_tokens - 1 - len(end) : -model.image_tokens - 1].tolist() == end


def test_an_image_is_seen_behind_its_own_embedding(model):
    v = model.vocabulary
    before, image, said = model.with_image("what", "")
    plain = janus_prompt.with_image(model.tokens, "what", v, model.hv_tokens)
    assert isinstance(before, TextSegment) and [*before.ids, v.boi] == plain[0].ids
    assert image == VisualSegment(model.hv_tokens + 1) and said == plain[2]
    rows = model.understood(torch.ones(2, 9, 64))
    assert torch.equal(rows[:, 1:], torch.ones(2, 9, 64)) and torch.equal(rows[0, 0], model.beg_of_und_embed[0])


# sampling


@torch.no_grad()
def test_the_cache_gives_what_a_whole_pass_gives(model):
    """Prompts of different lengths, both branches: every step by one pass over everything."""
    given = [model.caption(text) for text in ("a red square drawn with care", "a")]
    start = torch.randn(2, model.codec.channels, model.side, model.side, generator=torch.Generator().manual_seed(0))
    kept = sampling.denoise(model, given, None, start, steps=3, guidance=3.0)
    z = start
    for step in range(3):
        cond, uncond = (
            model.predict_velocity(
                prompt.image_layout(given, [gone] * 2, model.vocabulary, model.image_tokens + 1),
                None, z, torch.full((2,), step / 3),
            )
            for gone in (False, True)
        )  # fmt: skip
        z = z + (uncond + 3 * (cond - uncond)) / 3
    torch.testing.assert_close(kept, z, rtol=1e-4, atol=1e-4)


def test_the_velocity_of_a_model_that_knows_leads_to_its_image():
    """Time runs from noise to image: with the true velocity of one image every start ends there."""
    model = load("janusflow")
    pixels = torch.tensor([250, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 20, 20)
    target = model.codec.latents(model.encode(Batch("t2i", torch.arange(1), ["a"], gen=[pixels]))["moments"])
    times = []

    def known(hidden, features, time):
        times.append(len(times) / 4)
        return ((target - z[-1]) / (1 - times[-1])).expand(len(hidden), -1, -1, -1)

    z = [torch.randn(target.shape, generator=torch.Generator().manual_seed(1))]
    model.velocity = known
    given = [model.caption("a")]
    end = sampling.denoise(model, given, None, z[0], steps=4, guidance=1.0, on_step=lambda v: z.append(z[-1] + v / 4))
    torch.testing.assert_close(end, target, rtol=0, atol=1e-4)
