"""OpenUni's RECA step against the released RECA code: data, prompt, two losses, one optimizer update."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from reca.config.recipe import OptimConfig
from reca.data.batch import Batch
from reca.data.transforms import make_view
from reca.models.open_uni import loss
from reca.optim import freeze, gradient_norm, make_optimizer, set_lr
from tests.golden.open_uni import (
    GRADIENT,
    Record,
    Recorded,
    build,
    close,
    expanded,
    laid_out,
    release_src,
    same_stages,
)

# what moves all keys alike and so nothing that is attended to: no rotary position stands between
ZERO = re.compile(r"connector\..*k_proj\.bias|transformer\..*attn2\.to_k\.bias")


def matches(config: dict) -> bool:
    return str(config.get("model")).startswith("OpenUni RecA")


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


@pytest.fixture(scope="module")
def batch(golden):
    texts = [golden.config["templates"][i] for i in golden.data["data.template_index"].tolist()]
    return Batch("reca", torch.arange(len(texts)), texts)


def step(model, golden, batch, name):
    features = {"latents": golden.data["latents"], "h_v": golden.data["h_v"]}
    return model(replace(batch, features=features), Recorded(golden.data[f"{name}.noise"], golden.data[f"{name}.u"]))


def test_crop_and_resize(golden, model):
    for i, (left, top, side) in enumerate(golden.data["data.crop_x0_y0_side"].tolist()):
        image = Image.fromarray(golden.data[f"data.image_{i}"].numpy()).crop((left, top, left + side, top + side))
        close(make_view(image, model.views("reca").gen) / 127.5 - 1, golden.data["batch.pixel_values"][i])


def test_ids(golden, model, batch):
    prompts = loss.sample_prompts(model, batch, None)
    assert [expanded(model, asked) for asked in prompts] == [
        golden.data[f"data.ids_{i}"].tolist() for i in range(len(prompts))
    ]
    layout, mask = laid_out(model, prompts, "left")
    assert torch.equal(mask, golden.data["batch.attention_mask"])
    assert torch.equal(release_src(model, layout), golden.data["batch.input_ids"])


def test_frozen_encoders(golden, model):
    close(model.encode_understanding(golden.data["batch.pixel_values_src"]), golden.data["h_v"])
    close(model.latents(golden.data["batch.pixel_values"]), golden.data["latents"])


def steps(golden):
    """Names of the recorded micro-batches, in order."""
    found = {key.split(".")[0] for key in golden.data if re.match(r"step\d+\.loss", key)}
    return sorted(found, key=lambda name: int(name.removeprefix("step")))


def test_loss(golden, model, batch):
    assert steps(golden)
    for name in steps(golden):
        same_step(golden, model, batch, name)


def same_step(golden, model, batch, name):
    data = golden.data
    with Record(model) as record:
        term = step(model, golden, batch, name)
    part = {key: data[key] for key in ("inputs_embeds", "llm_mask", "position_ids", "query_hidden")}
    same_stages(record, data["batch.attention_mask"], part)
    ((noisy,), given, (velocity,)) = record.seen["dit"][0]
    close(given["encoder_hidden_states"].detach(), data["cond"])
    close(given["timestep"], data[f"{name}.timesteps"])
    if f"{name}.noisy" in data:
        close(noisy, data[f"{name}.noisy"])
    close(velocity.detach(), data[f"{name}.model_pred"])
    close((term.sum / term.weight).detach(), data[f"{name}.loss"][0])


def test_gradient_and_update(golden, model, batch):
    """The micro-batches of an update, the mean of their gradients clipped, one AdamW step with its decay groups."""
    data, c = golden.data, golden.config["optimizer"]
    freeze(model, None)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(
        model, OptimConfig(lr=c["lr"], betas=c["betas"], eps=c["eps"], weight_decay=c["weight_decay"])
    )
    set_lr(optimizer, c["lr"])
    model.zero_grad()
    for number, name in enumerate(steps(golden)[: c["accumulation"]]):
        term = step(model, golden, batch, name)
        (term.sum / term.weight / c["accumulation"]).backward()
        if number == 0:
            for key, wanted in data.items():
                if key.startswith(f"{name}.grad_norm."):
                    ours = model.get_parameter(key.removeprefix(f"{name}.grad_norm.")).grad.norm() * c["accumulation"]
                    assert float(ours) == pytest.approx(float(wanted), rel=GRADIENT), key
    assert gradient_norm(model, c["clip"]) == pytest.approx(float(data["update.total_norm"]), rel=GRADIENT)
    optimizer.step()
    for key, wanted in data.items():
        if key.startswith("update.delta_norm."):
            name = key.removeprefix("update.delta_norm.")
            ours = float((model.get_parameter(name).detach() - before[name]).norm())
            # Where the gradient is zero, Adam steps on what rounding left of it: by up to lr, in any direction.
            noise = c["lr"] * before[name].numel() ** 0.5 if ZERO.search(name) else 0.0
            assert ours == pytest.approx(float(wanted), rel=2e-3, abs=noise), name
    torch.testing.assert_close(model.meta_queries.detach(), data["update.meta_queries"], rtol=0, atol=1e-2 * c["lr"])
