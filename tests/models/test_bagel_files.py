"""BAGEL's files: export, everything that can be loaded, and files that do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca.models.bagel import Adapter, prompt
from reca.models.common.tiny_tokenizer import word_tokenizer
from tests.models.test_bagel import FLUX, WORDS, built, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the FLUX codec as `export` writes it, in fp32."""
    path = tmp_path_factory.mktemp("exported")
    built("flux").export(path, torch.float32)
    return path


def copy(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def same(a: Adapter, b: Adapter, rounded: bool = False) -> None:
    for name, tensor in a.state_dict().items():
        kept = name.startswith("codec.") or name.endswith("pos_embed")
        wanted = tensor.bfloat16().float() if rounded and not kept else tensor
        assert torch.equal(b.state_dict()[name], wanted), name


def test_export_and_load(folder, tmp_path):
    flux = built("flux")
    configs = {"config.json", "llm_config.json", "vit_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in folder.iterdir()} == {"ae.safetensors", "ema.safetensors", *configs}
    again = Adapter.load(replace(config(weights=str(folder), **FLUX), words=[]))
    same(flux, again)
    assert again.tokenizer.get_vocab() == flux.tokenizer.get_vocab()
    images = [model.generate(["a red square"], [0], steps=2)[0] for model in (again, flux)]
    assert torch.equal(*images)
    flux.export(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "ema.safetensors").values()} == {torch.bfloat16}
    same(flux, Adapter.load(config(weights=str(tmp_path), **FLUX)), rounded=True)
    vit = json.loads((folder / "vit_config.json").read_text())
    assert vit["num_hidden_layers"] == 4  # one more than is stored
    assert not [name for name in load_file(folder / "ema.safetensors") if ".encoder.layers.3." in name]


def test_shards_files_and_overlays(folder, tmp_path):
    flux = built("flux")
    copy(folder, tmp_path)
    whole = load_file(tmp_path / "ema.safetensors")
    (tmp_path / "ema.safetensors").rename(tmp_path / "elsewhere.safetensors")
    same(flux, Adapter.load(config(weights=str(tmp_path / "elsewhere.safetensors"), **FLUX)))
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({n: whole[n] for n in members}, tmp_path / part)
    index = {n: part for part, members in parts.items() for n in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(flux, Adapter.load(config(weights=str(tmp_path), **FLUX)))
    changed = {"llm2vae.bias": whole["llm2vae.bias"] + 1}
    save_file(changed, tmp_path / "delta.safetensors")
    over = Adapter.load(config(weights=str(folder), overlay=str(tmp_path / "delta.safetensors"), **FLUX))
    assert torch.equal(over.llm2vae.bias, changed["llm2vae.bias"])
    assert torch.equal(over.vae2llm.weight, flux.vae2llm.weight)


def test_an_index_beside_the_file_that_it_lists(folder, tmp_path):
    """BAGEL's hub repository has one of the names in ema.safetensors, and in ae.safetensors."""
    copy(folder, tmp_path)
    index = {name: file for file in ("ema.safetensors", "ae.safetensors") for name in load_file(folder / file)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(built("flux"), Adapter.load(config(weights=str(tmp_path), **FLUX)))
    elsewhere = dict.fromkeys(index, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(ValueError, match=r"ema.safetensors and model.safetensors.index.json; name the file"):
        Adapter.load(config(weights=str(tmp_path), **FLUX))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("connector.fc2.bias"), "1 missing: connector.fc2.bias"),
        (lambda s: s.update({"vision.extra": torch.zeros(1)}), "1 unexpected: vision.extra"),
        (lambda s: s.update({"llm2vae.bias": torch.zeros(3)}), r"with another shape: llm2vae.bias: file \(3,\)"),
        (lambda s: s.update({"latent_pos_embed.pos_embed": torch.zeros(16, 64)}), "latent_pos_embed.pos_embed: file"),
    ],
)
def test_files_that_do_not_fit(folder, tmp_path, change, words):
    copy(folder, tmp_path)
    state = load_file(tmp_path / "ema.safetensors")
    change(state)
    save_file(state, tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=words):
        Adapter.load(config(weights=str(tmp_path), **FLUX))


def test_folders_that_do_not_fit(folder, tmp_path):
    def spoiled(name, content=None):
        target = tmp_path / name.replace("/", "_")
        target.mkdir()
        copy(folder, target)
        (target / name).unlink() if content is None else (target / name).write_text(content)
        return str(target)

    for source, words in (
        (
            spoiled("llm_config.json", '{"rope_theta": 1e4}'),
            r"llm_config.json does not fit the recipe: rope_theta is 10000.0, .* 1000000.0 \(model.lang",
        ),
        (spoiled("ema.safetensors"), "contains none of ema.safetensors"),
        (spoiled("model.safetensors", ""), "ema.safetensors and model.safetensors; name the file"),
        (spoiled("ae.safetensors"), "ae.safetensors does not exist; set model.codec_weights"),
        (str(tmp_path / "nowhere"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            Adapter.load(config(weights=source, **FLUX))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes())
    with pytest.raises(ValueError, match="contains no tokenizer"):
        Adapter.load(config(weights=str(bare), **FLUX))
    with pytest.raises(ValueError, match="need model.weights, which is null"):
        Adapter.load(config(overlay="somewhere.safetensors"))


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="ids up to 104, but model.language.vocab_size=96"):
        Adapter.load(config(words=[f"word{i}" for i in range(100)]))
    word_tokenizer(WORDS, [prompt.BEGIN]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>, <\|vision_start\|>"):
        Adapter.load(config(tokenizer=str(tmp_path)))
    word_tokenizer(WORDS, prompt.SPECIAL_TOKENS).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["square"] = 101  # fewer tokens than the table has rows, one of them beyond
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ids up to 101, but model.language.vocab_size=96"):
        Adapter.load(config(tokenizer=str(tmp_path)))
