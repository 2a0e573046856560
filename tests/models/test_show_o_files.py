"""Show-o's files: published names, everything that can be loaded, export, and files that do not fit."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.show_o import Adapter, prompt
from reca.rng import CounterRNG
from tests.models.test_show_o import WORDS, batch, config, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as `export` writes it."""
    path = tmp_path_factory.mktemp("exported")
    Adapter.load(config()).export(path)
    return path


def test_round_trip(folder):
    model, loaded = Adapter.load(config()), Adapter.load(replace(tiny(), weights=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "clip", "codec", "config.json", "pytorch_model.safetensors", "tokenizer",
    ]  # fmt: skip
    for (name, one), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    for task in ("reca", "i2t", "t2i"):
        assert torch.equal(model(batch(model, task), CounterRNG(0)).sum, loaded(batch(model, task), CounterRNG(0)).sum)
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_published_names(folder):
    config_json = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "pytorch_model.safetensors")
    assert {name.split(".")[0] for name in state} == {"showo", "mm_projector"}
    assert config_json["_class_name"] == "Showo" and config_json["w_clip_vit"] is True
    assert config_json["vocab_size"] == config_json["mask_token_id"] + 1 == len(state["showo.lm_head.bias"])
    assert config_json["num_vq_tokens"] == 25 and config_json["codebook_size"] == 145


def copied(folder, path, change=lambda state: None, name: str = "pytorch_model.safetensors"):
    """The exported folder with changed tensors."""
    shutil.copytree(folder, path)
    state = load_file(path / "pytorch_model.safetensors")
    change(state)
    (path / "pytorch_model.safetensors").unlink()
    target = path / name
    target.parent.mkdir(exist_ok=True)
    save_file(state, target) if target.suffix == ".safetensors" else torch.save(state, target)
    return path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "unwrapped_model/pytorch_model.bin"])
def test_other_file_names(folder, tmp_path, name):
    loaded = Adapter.load(replace(tiny(), weights=str(copied(folder, tmp_path / "x", name=name))))
    assert torch.equal(loaded.showo.lm_head.weight, Adapter.load(config()).showo.lm_head.weight)


def test_clip_files_of_transformers_4_with_text_tower(folder, tmp_path):
    """openai/clip-vit-large-patch14-336: the whole of CLIP under the old names."""
    state = load_file(folder / "clip" / "pytorch_model.safetensors")
    old = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    last = "vision_model.encoder.layers."
    old |= {n.replace(f"{last}1.", f"{last}2."): t.clone() for n, t in old.items() if n.startswith(f"{last}1.")}
    old |= {"text_model.final_layer_norm.bias": torch.zeros(2), "logit_scale": torch.zeros(())}
    old |= {
        "vision_model.post_layernorm.weight": torch.zeros(64),
        "vision_model.embeddings.position_ids": torch.arange(10),
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    loaded = Adapter.load(replace(tiny(), weights=str(folder), clip_weights=str(tmp_path)))
    for name, tensor in loaded.clip.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_dtype(folder):
    model = Adapter.load(replace(tiny(), weights=str(folder), dtype="bf16"))
    assert (
        {p.dtype for p in model.showo.parameters()}
        == {p.dtype for p in model.mm_projector.parameters()}
        == {torch.bfloat16}
    )
    random = Adapter.load(config(dtype="bf16"))
    assert all(p.dtype == random.get_parameter(name).dtype for name, p in model.named_parameters())
    assert {p.dtype for p in model.clip.parameters()} == {torch.float32}
    assert model.codec.codebook.dtype == torch.float32
    assert len(model.generate(["a red square"], [0], steps=2)) == 1
    assert math.isfinite(float(model(batch(model, "reca"), CounterRNG(0)).sum.detach()))


def drop(state):
    del state["showo.model.layers.1.mlp.fc1.bias"]


def add(state):
    state["showo.model.layers.9.mlp.fc1.bias"] = torch.zeros(1)


def reshape(state):
    state["mm_projector.2.bias"] = torch.zeros(95)


@pytest.mark.parametrize(
    "change, said",
    [
        (drop, "1 missing: showo.model.layers.1.mlp.fc1.bias"),
        (add, "1 unexpected: showo.model.layers.9.mlp.fc1.bias"),
        (reshape, r"mm_projector.2.bias: file \(95,\), model \(96,\)"),
    ],
)
def test_wrong_tensors(folder, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        Adapter.load(replace(tiny(), weights=str(copied(folder, tmp_path / "x", change))))


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Adapter.load(replace(tiny(), weights=str(tmp_path / "nowhere")))
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"contains none of pytorch_model\.safetensors"):
        Adapter.load(replace(tiny(), weights=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has no subfolder 'codec'; set model\.codec_weights"):
        copied(folder, tmp_path / "x")
        shutil.rmtree(tmp_path / "x" / "codec")
        Adapter.load(replace(tiny(), weights=str(tmp_path / "x")))


def test_tokenizer_of_a_wrong_length(folder, tmp_path):
    tokenizer = word_tokenizer([*WORDS, "more"], [prompt.END_OF_TEXT])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"llm_vocab_size is \d+, but the recipe makes it \d+ \(model\.tokenizer\)"):
        Adapter.load(replace(tiny(), weights=str(folder), tokenizer=str(tmp_path)))


def test_tokenizer_without_end_of_text(tmp_path):
    word_tokenizer(WORDS, []).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>"):
        Adapter.load(replace(config(), tokenizer=str(tmp_path)))


def test_tokenizer_with_some_of_the_special_tokens(tmp_path):
    word_tokenizer(WORDS, [prompt.END_OF_TEXT, "<|soi|>"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has some of Show-o's tokens but lacks \[PAD\]"):
        Adapter.load(replace(config(), tokenizer=str(tmp_path)))


def test_end_of_text_may_be_the_unknown_token(tmp_path):
    """As in Phi's tokenizer."""
    tokenizer = word_tokenizer(WORDS, [prompt.END_OF_TEXT])
    tokenizer.unk_token = prompt.END_OF_TEXT
    tokenizer.save_pretrained(tmp_path)
    assert Adapter.load(replace(config(), tokenizer=str(tmp_path))).vocabulary.eos == len(WORDS) + 1


@pytest.mark.parametrize(
    "given, said",
    [
        ({"understanding": "vq"}, r"w_clip_vit is True, but the recipe makes it False \(model.understanding\)"),
        ({"image_size": 24}, r"num_vq_tokens is 25, .* \(model.image_size"),
        ({"patches": replace(tiny().patches, entries=100)}, r"codebook_size is 145, .* \(model.codec"),
    ],
)
def test_recipe_that_does_not_fit_the_checkpoint(folder, given, said):
    with pytest.raises(ValueError, match=said):
        Adapter.load(replace(tiny(), weights=str(folder), hv_down_scale=1, **given))
