"""OpenUni against the public code: preprocessing, understanding, both losses, sampling, conversation."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.transforms import make_view
from reca.models.open_uni import loss, prompt, sampling
from reca.rng import CounterRNG
from tests.golden.open_uni import (
    GRADIENT,
    ByteTokenizer,
    Record,
    Recorded,
    build,
    close,
    expanded,
    laid_out,
    release_src,
    same_stages,
    wrong_norms,
)


def matches(config: dict) -> bool:
    return config.get("model") == "open_uni"


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


@pytest.fixture
def rng(golden):
    """Those samples of the text-to-image case lose their caption whose ids are the unconditional prompt's."""
    data, empty = golden.data, len(ByteTokenizer.of(golden).whole(golden.cases["strings"]["cfg_prompt"]))
    kept = [float(mask.sum()) != empty for mask in data["t2i.attention_mask"]]
    return Recorded(data["train.noise"], data["train.u"], torch.tensor(kept, dtype=torch.float32))


def batch(golden, task):
    c, n = golden.config, len(golden.data[f"{task}.input_ids"])
    return Batch(task, torch.arange(n), c["templates"][:n] if task == "reca" else [c["caption"]] * n)


def features(golden, task):
    n = len(golden.data[f"{task}.input_ids"])
    made = {"latents": golden.data["vae.latents"][:n]}
    return made | {"h_v": golden.data["und.h_v"][:n]} if task == "reca" else made


def test_crop_and_resize(golden, model):
    data = golden.data
    left, top, right, bottom = data["pre.crop_box"].tolist()
    image = Image.fromarray(data["pre.raw_rgb"].numpy()).crop((left, top, right, bottom))
    view = make_view(image, model.views("reca").gen)
    close(view / 127.5 - 1, data["pre.pixel_values"])


def test_understanding(golden, model):
    data = golden.data
    pixels = data["und.pixel_values"]
    close(model.vit_pixels(pixels), data["und.vit_pixels"])
    hidden = model.mllm.model.vision_tower(data["und.vit_pixels"]).last_hidden_state
    close(hidden.detach(), data["und.vit_last_hidden"])
    close(model.encode_understanding(pixels), data["und.h_v"])


def test_autoencoder(golden, model):
    data = golden.data
    close(model.latents(data["und.pixel_values"]), data["vae.latents"])
    with torch.no_grad():
        close(model.codec.decode(data["vae.latents"] / model.codec.config.scaling_factor).sample, data["vae.decoded"])


def test_prompt_texts(golden, model):
    strings, c = golden.cases["strings"], golden.config
    tokenizer = model.tokenizer
    for text, wanted in zip(c["templates"], strings["reca_prompt"], strict=True):
        assert expanded(model, prompt.with_image(tokenizer, text)) == tokenizer.whole(wanted)
    assert prompt.caption(tokenizer, c["caption"]).ids == tokenizer.whole(strings["t2i_prompt"])
    assert prompt.caption(tokenizer, None).ids == tokenizer.whole(strings["cfg_prompt"])


@pytest.mark.parametrize("task", ["reca", "t2i"])
def test_ids_and_padding(golden, model, rng, task):
    prompts = loss.sample_prompts(model, batch(golden, task), rng)
    layout, mask = laid_out(model, prompts, "left" if task == "reca" else "right")
    assert torch.equal(mask, golden.data[f"{task}.attention_mask"])
    wanted = golden.data[f"{task}.input_ids"]
    assert torch.equal(release_src(model, layout), torch.where(mask, wanted, prompt.PAD_ID))
    context = model.tokenizer.convert_tokens_to_ids(prompt.CONTEXT)
    assert layout.src[layout.src < 0].tolist() == list(range(-1, -1 - int((wanted == context).sum()), -1))


@pytest.mark.parametrize("task", ["reca", "t2i"])
def test_loss_and_every_stage_of_it(golden, model, rng, task):
    data = golden.data
    part = {name: data[f"{task}.{name}"] for name in ("inputs_embeds", "llm_mask", "position_ids", "connector_out")}
    part["query_hidden"] = data[f"{task}.llm_query_hidden"]
    model.zero_grad()
    with Record(model) as record:
        term = model(replace(batch(golden, task), features=features(golden, task)), rng)
    same_stages(record, data[f"{task}.attention_mask"], part)
    ((noisy,), given, (velocity,)) = record.seen["dit"][0]
    close(noisy, data[f"{task}.noisy"])
    close(given["encoder_hidden_states"].detach(), data[f"{task}.prompt_embeds"])
    close(given["timestep"], data[f"{task}.timesteps"])
    samples = torch.arange(len(noisy))
    close(loss.noise_level(rng, samples), data["train.sigmas_at_timesteps"][samples])
    close(velocity.detach(), data[f"{task}.model_pred"])
    mean = term.sum / term.weight
    close(mean.detach(), data[f"{task}.loss"])

    mean.backward()
    cases = golden.cases
    assert not wrong_norms(model, cases["grad_norms"][task], cases["zero_grad_params"][task])
    parameters = dict(model.named_parameters())
    for name, wanted in data.items():
        if name.startswith(f"{task}.grad."):
            ours = parameters[name.removeprefix(f"{task}.grad.")].grad
            assert float((ours - wanted).norm()) <= GRADIENT * float(wanted.norm()), name
    assert not cases["trainable_without_grad"]


def test_generation(golden, model):
    data, c = golden.data, golden.config
    asked = [prompt.caption(model.tokenizer, text) for text in (c["caption"], None)]
    assert [row.ids for row in asked] == [
        model.tokenizer.whole(text) for text in golden.cases["strings"]["gen_prompts"]
    ]
    layout, mask = laid_out(model, asked, "right")
    assert torch.equal(mask, data["gen.attention_mask"])
    assert torch.equal(layout.src[mask].long(), data["gen.input_ids"][mask])
    with torch.no_grad():
        cond, uncond = (sampling.condition(model, [row], None) for row in asked)
    close(torch.cat((cond, uncond)), data["gen.prompt_embeds"])

    solver = sampling.scheduler()
    solver.set_timesteps(c["num_steps"])
    close(solver.timesteps.float(), data["gen.timesteps"].float())
    close(solver.sigmas, data["gen.sigmas"])

    steps, guided = [], []
    image = sampling.denoise(
        model, cond, uncond, data["gen.init_latents"], c["num_steps"], c["cfg_scale"],
        on_step=lambda pipe, i, t, kept: (steps.append(kept["latents"].clone()), kept)[1],
    )  # fmt: skip
    with Record(model) as record:
        sampling.denoise(model, cond, uncond, data["gen.init_latents"], c["num_steps"], c["cfg_scale"])
    for _, _, (velocity,) in record.seen["dit"]:
        without, with_text = velocity.chunk(2)
        guided.append(without + c["cfg_scale"] * (with_text - without))
    close(torch.stack(guided), data["gen.guided_pred"])
    close(torch.stack(steps), data["gen.latents_after_step"])
    close(steps[-1], data["gen.final_latents"])
    close(image, data["gen.image"])


def test_conversation(golden, model):
    data = golden.data
    asked, answered = golden.cases["strings"]["i2t_text"].split("<|im_end|>\n<|im_start|>assistant\n")
    turn = Turn(asked.rsplit("</img>\n", 1)[1], answered.removesuffix("<|im_end|>"))
    sample = Batch("i2t", torch.arange(1), [[turn]])
    talk = prompt.conversation(model.tokenizer, sample.text[0], prompt.MAX_LENGTH)
    labels = expanded(model, talk._replace(ids=talk.labels))  # one for every row of h_v, too
    context = model.tokenizer.convert_tokens_to_ids(prompt.CONTEXT)
    assert [expanded(model, talk)] == data["i2t.input_ids"].tolist()
    assert [[-100 if label == context else label for label in labels]] == data["i2t.labels"].tolist()
    h_v = data["und.h_v"][:1]
    with Record(model) as record:
        term = model(replace(sample, features={"h_v": h_v}), CounterRNG(0))
    logits = model.mllm.lm_head(record.seen["language"][0][2].last_hidden_state)
    close(logits.detach(), data["i2t.logits"])
    close((term.sum / term.weight).detach(), data["i2t.loss"])
    assert (
        model.prepare(sample, CounterRNG(0)).weight
        == float(term.weight)
        == sum(label != -100 for label in talk.labels[1:])
    )
