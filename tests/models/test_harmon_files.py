"""Harmon's files: published names and sizes, everything that can be loaded, export, and files that do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reca.config.recipe_files import load_recipe
from reca.models.common.ldm_autoencoder import to_diffusers, to_ldm
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.harmon import Adapter, weights
from reca.rng import CounterRNG
from tests.models.test_harmon import KL16, WORDS, batch, config, tiny

# in millions, from the models' page: LLM, MAR with class table, blocks of encoder and of decoder, head, projectors, all
SIZES = {
    "harmon_0_5b": (494.0, 207.9, 85.1, 35.7, 3.0, 704.9),
    "harmon_1_5b": (1543.7, 942.4, 393.5, 151.2, 8.7, 2494.8),
}
DEPTHS = {"harmon_0_5b": (24, 12, 6), "harmon_1_5b": (28, 20, 12)}


def published(recipe: str) -> Adapter:
    with torch.device("meta"):
        return Adapter(load_recipe(recipe).model, None)


def millions(state: dict[str, torch.Tensor], *prefixes: str) -> float:
    whole = {n: t for n, t in state.items() if n.startswith(prefixes) and n != weights.HEAD}
    return round(sum(t.numel() for t in whole.values()) / 1e6, 1)


@pytest.mark.parametrize("recipe", SIZES)
def test_published_sizes(recipe):
    state = published(recipe).state_dict()
    llm, mar, stack, head, projectors, trained = SIZES[recipe]
    assert millions(state, "llm.") == llm and millions(state, "mar.") == mar
    assert millions(state, "mar.encoder_blocks.") == millions(state, "mar.decoder_blocks.") == stack
    assert millions(state, "mar.diffloss.") == head and millions(state, "proj_") == projectors
    assert millions(state, "llm.", "mar.", "proj_") == trained
    assert [millions(state, part) for part in ("codec.", "codec.encoder.", "codec.decoder.")] == [66.5, 28.3, 38.2]


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def names(layers: int, blocks: int, depth: int) -> set[str]:
    """The keys of harmon_*.pth, from the models' page."""
    found = {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"}
    for i in range(layers):
        layer = f"llm.model.layers.{i}"
        found |= both(*(f"{layer}.self_attn.{p}_proj" for p in "qkv"))
        found |= {f"{layer}.{n}.weight" for n in ("self_attn.o_proj", "input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    found |= both("proj_in.0", "proj_in.2", "proj_out.0", "proj_out.2")
    found |= {"mar.fake_latent", "mar.class_emb.weight", "mar.mask_token"}
    found |= {f"mar.{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")}
    found |= both("mar.z_proj", "mar.z_proj_ln", "mar.encoder_norm", "mar.decoder_embed", "mar.decoder_norm")
    for i in range(blocks):
        for part in ("encoder", "decoder"):
            inner = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            found |= both(*(f"mar.{part}_blocks.{i}.{n}" for n in inner))
    net = "mar.diffloss.net"
    found |= both(*(f"{net}.{n}" for n in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj")))
    for k in range(depth):
        found |= both(*(f"{net}.res_blocks.{k}.{n}" for n in ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")))
    return found | both(f"{net}.final_layer.linear", f"{net}.final_layer.adaLN_modulation.1")


@pytest.mark.parametrize("recipe", DEPTHS)
def test_published_names_and_shapes(recipe):
    model = published(recipe)
    state = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("codec.")}
    assert state.keys() == names(*DEPTHS[recipe])
    c = model.config
    width, hidden, head = c.mar.width, c.language.hidden_size, c.mar.head_width
    assert state["llm.lm_head.weight"] == (151936, hidden)
    assert state["mar.encoder_pos_embed_learned"] == (1, 256 + 64, width)
    assert state["mar.diffusion_pos_embed_learned"] == (1, 256, width) and state["mar.fake_latent"] == (1, width)
    assert state["mar.class_emb.weight"] == (1000, width) and state["mar.z_proj.weight"] == (width, 16)
    assert state["mar.encoder_blocks.0.attn.qkv.weight"] == (3 * width, width)
    assert state["mar.diffloss.net.time_embed.mlp.0.weight"] == (head, 256)
    assert state["mar.diffloss.net.final_layer.linear.weight"] == (32, head)
    assert state["proj_in.0.weight"] == (hidden, width) and state["proj_out.2.weight"] == (width, hidden)


def vae_names() -> set[str]:
    """The keys of kl16.ckpt, as latent diffusion names them."""

    def block(name: str, changes: bool) -> set[str]:
        shortcut = both(f"{name}.nin_shortcut") if changes else set()
        return both(*(f"{name}.{part}" for part in ("norm1", "conv1", "norm2", "conv2"))) | shortcut

    attention = lambda name: both(*(f"{name}.{part}" for part in ("norm", "q", "k", "v", "proj_out")))  # noqa: E731
    found = both("quant_conv", "post_quant_conv")
    for side in ("encoder", "decoder"):
        found |= both(f"{side}.conv_in", f"{side}.norm_out", f"{side}.conv_out") | attention(f"{side}.mid.attn_1")
        found |= block(f"{side}.mid.block_1", False) | block(f"{side}.mid.block_2", False)
    for level in range(5):
        for j in range(2):
            found |= block(f"encoder.down.{level}.block.{j}", level in (2, 4) and j == 0)
        for j in range(3):
            found |= block(f"decoder.up.{level}.block.{j}", level in (1, 3) and j == 0)
        if level < 4:
            found |= both(f"encoder.down.{level}.downsample.conv")
        if level > 0:
            found |= both(f"decoder.up.{level}.upsample.conv")
    return found | attention("encoder.down.4.attn.0") | attention("encoder.down.4.attn.1")


def test_published_names_of_the_autoencoder():
    vae = published("harmon_0_5b").codec.state_dict()
    there = to_ldm(vae, 5)
    assert there.keys() == vae_names()
    assert there["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert there["encoder.mid.attn_1.norm.weight"].shape == (512,)
    back = to_diffusers(there, 5)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in vae.items()}


# loading


@pytest.fixture(scope="module")
def model():
    return Adapter.load(config(**KL16)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A tiny model as `export` writes it."""
    path = tmp_path_factory.mktemp("exported")
    model.export(path)
    return path


def loaded(**changes) -> Adapter:
    return Adapter.load(replace(tiny(), **KL16, **changes)).eval()


def same(one: Adapter, other: Adapter) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b), name
    assert other.llm.lm_head.weight is other.llm.model.embed_tokens.weight
    assert all(p.requires_grad and not p.is_meta for p in other.parameters())


def test_round_trip(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["harmon.pth", "kl16.ckpt", "tokenizer"]
    other = loaded(weights=str(folder))
    same(model, other)
    for task in ("reca", "i2t", "t2i"):
        assert torch.equal(model(batch(model, task), CounterRNG(0)).sum, other(batch(other, task), CounterRNG(0)).sum)
    same(model, loaded(weights=str(folder / "harmon.pth")))


def test_export_is_what_the_public_code_reads(model, folder):
    state = torch.load(folder / "harmon.pth")
    assert {name.split(".")[0] for name in state} == {"llm", "mar", "proj_in", "proj_out"}
    assert state["llm.lm_head.weight"].data_ptr() == state["llm.model.embed_tokens.weight"].data_ptr()
    vae = torch.load(folder / "kl16.ckpt")["model"]
    assert "encoder.down.0.block.0.conv1.weight" in vae and vae["encoder.mid.attn_1.q.weight"].ndim == 4


def test_parts_that_were_given_are_not_exported_again(folder, tmp_path):
    loaded(**changed(folder, tmp_path, lambda state: None)).export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["harmon.pth"]


def test_a_random_model_without_autoencoder_exports_and_loads(tmp_path):
    one = Adapter.load(config())
    one.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harmon.pth", "kl16.ckpt", "tokenizer"]
    same(one, Adapter.load(replace(tiny(), weights=str(tmp_path))))


def test_random_model_with_a_trained_autoencoder(model, folder):
    other = loaded(words=WORDS, codec_weights=str(folder / "kl16.ckpt"), seed=3)
    assert torch.equal(other.codec.decoder.conv_in.weight, model.codec.decoder.conv_in.weight)
    assert not torch.equal(other.mar.mask_token, model.mar.mask_token)


def shards(path, state):
    halves = list(state.items())[::2], list(state.items())[1::2]
    weight_map = {}
    for i, half in enumerate(halves):
        save_file({n: t.clone() for n, t in half}, path / f"model-{i}.safetensors")
        weight_map |= {n: f"model-{i}.safetensors" for n, _ in half}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


WRITERS = {
    "state_dict": lambda path, state: torch.save({"state_dict": state, "meta": {"iter": 5}}, path / "iter_5000.pth"),
    "model": lambda path, state: torch.save({"model": state}, path / "x.ckpt"),
    "prefix": lambda path, state: torch.save({f"module.{n}": t for n, t in state.items()}, path / "x.bin"),
    "safetensors": lambda path, state: save_file({n: t.clone() for n, t in state.items()}, path / "model.safetensors"),
    "shards": shards,
    "no head": lambda path, state: torch.save({n: t for n, t in state.items() if n != weights.HEAD}, path / "x.pth"),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("vae", [False, True], ids=["vae apart", "vae inside"])
def test_every_form_of_file(model, folder, tmp_path, form, vae):
    state = torch.load(folder / "harmon.pth")
    if vae:
        state |= {f"vae.{n}": t for n, t in torch.load(folder / "kl16.ckpt")["model"].items()}
    WRITERS[form](tmp_path, state)
    apart = {} if vae else {"codec_weights": str(folder / "kl16.ckpt")}
    same(model, loaded(weights=str(tmp_path), tokenizer=str(folder / "tokenizer"), **apart))


def test_shards_beside_the_autoencoder(model, folder, tmp_path):
    """Without an index, the autoencoder's file is the only one that is no shard."""
    state = list(torch.load(folder / "harmon.pth").items())
    for part in range(2):
        torch.save(dict(state[part::2]), tmp_path / f"harmon-{part + 1}-of-2.pth")
    shutil.copy(folder / "kl16.ckpt", tmp_path)
    codec = {"codec_weights": str(folder / "kl16.ckpt"), "tokenizer": str(folder / "tokenizer")}
    same(model, loaded(weights=str(tmp_path), **codec))


def test_files_in_bf16_become_fp32(model, folder, tmp_path):
    state = {n: t.bfloat16() for n, t in torch.load(folder / "harmon.pth").items()}
    torch.save(state, tmp_path / "half.pth")
    rest = {"tokenizer": str(folder / "tokenizer"), "codec_weights": str(folder / "kl16.ckpt")}
    other = loaded(weights=str(tmp_path / "half.pth"), **rest)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert torch.equal(other.mar.mask_token, model.mar.mask_token.bfloat16().float())


def test_the_autoencoders_file_may_hold_a_loss(model, folder, tmp_path):
    state = torch.load(folder / "kl16.ckpt")["model"] | {"loss.logvar": torch.zeros(())}
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    same(model, loaded(weights=str(folder), codec_weights=str(tmp_path / "kl16.ckpt")))


def test_weights_are_not_copied_while_loading(folder, monkeypatch):
    """fp32 tensors of the file become the parameters; nothing is drawn at random before."""
    read, state = weights.read, {}
    monkeypatch.setattr(weights, "read", lambda path: state.setdefault("x", read(path)))
    other = loaded(weights=str(folder))
    found = state["x"][0]
    for name in ("mar.mask_token", "llm.model.embed_tokens.weight", "mar.encoder_blocks.1.mlp.fc1.weight"):
        assert other.state_dict()[name].data_ptr() == found[name].data_ptr()


# files that do not fit


def changed(folder, path, change):
    state = torch.load(folder / "harmon.pth")
    change(state)
    torch.save(state, path / "harmon.pth")
    return {
        "weights": str(path / "harmon.pth"),
        "codec_weights": str(folder / "kl16.ckpt"),
        "tokenizer": str(folder / "tokenizer"),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("mar.encoder_blocks.1.norm1.bias"), "1 missing: mar.encoder_blocks.1.norm1.bias"),
        (lambda s: s.pop("llm.model.embed_tokens.weight"), "1 missing: llm.model.embed_tokens.weight"),
        (lambda s: s.update({"mar.extra": torch.zeros(1)}), "1 unexpected: mar.extra"),
        (lambda s: s.update({"proj_in.2.bias": torch.zeros(3)}), r"shape: proj_in.2.bias: file \(3,\), model \(64,\)"),
        (lambda s: s.update({weights.HEAD: s[weights.HEAD] + 1}), "llm.lm_head.weight differs from llm.model.embed"),
    ],
)
def test_tensors_that_do_not_fit(folder, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        loaded(**changed(folder, tmp_path, change))


def test_parts_that_are_not_there(folder, tmp_path):
    given = changed(folder, tmp_path, lambda state: None)
    with pytest.raises(ValueError, match=r"contains no VAE; set model\.codec_weights"):
        loaded(**given | {"codec_weights": None})
    with pytest.raises(ValueError, match=r"contains no tokenizer; set model\.tokenizer"):
        loaded(**given | {"tokenizer": None})
    with pytest.raises(ValueError, match="does not exist"):
        loaded(weights=str(tmp_path / "nowhere.pth"))
    torch.save({}, tmp_path / "second.pth")
    with pytest.raises(ValueError, match=r"several weight files \(harmon\.pth, second\.pth\); name the one"):
        loaded(**given | {"weights": str(tmp_path)})


def test_foreign_tokenizer(folder, tmp_path):
    word_tokenizer(WORDS, ["<|im_start|>"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|im_end\|>, <\|endoftext\|>"):
        loaded(weights=str(folder), tokenizer=str(tmp_path))
