"""Harmon against the public code: preprocessing, understanding, three losses and their gradients, sampling, answers."""

import pytest
import torch
from PIL import Image

from reca.data.batch import Batch
from reca.data.transforms import make_view
from reca.models.common import planned
from reca.models.harmon import loss, prompt, sampling
from reca.rng import CounterRNG
from reca_kernels import diffusion_add_noise, diffusion_loss, diffusion_schedule, space_timesteps, template_concat
from reca_kernels.diffusion_loss import reference
from tests.golden.harmon import GENERATION, STAGE, Recorded, RecordedChance, Spy, branches, build, close, prompts


def matches(config: dict) -> bool:
    return "mar" in config and "llm" in config


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


def grid(golden) -> tuple[int, int]:
    return golden.config["image"]["m"], golden.config["image"]["n"]


def buffers_last(golden, encoded):
    return encoded.roll(-golden.config["mar"]["buffer_size"], dims=1)


# pixels


def test_images_to_reconstruct_and_to_understand(golden, model):
    data = golden.data
    image = Image.fromarray(data["prep.image_u8"].numpy())
    model.config.image_size, kept = data["prep.recon_pixels"].shape[-1], model.config.image_size
    gen, und = model.views("reca").gen, model.views("i2t").und
    model.config.image_size = kept
    assert torch.equal(make_view(image, gen) / 255 * 2 - 1, data["prep.recon_pixels"])
    assert torch.equal(make_view(image, und) / 255 * 2 - 1, data["prep.i2t_pixels"])


def test_autoencoder(golden, model):
    data = golden.data
    with torch.no_grad():
        close(model.codec.encode(data["vae.pixels"]).latent_dist.parameters, data["vae.moments"])
    close(model.latents(data["vae.pixels"]), data["vae.latents"])
    close(model.pixels(data["vae.decode_in"]), data["vae.decode_out"])


# understanding


def test_understanding(golden, model):
    data = golden.data
    encoded = model.mar.encode(data["vae.latents"])
    close(encoded, data["und.x_enc"])
    close(buffers_last(golden, model.encode_understanding(encoded)), data["und.h_v"])


def test_position_tables(golden, model):
    mar, data = model.mar, golden.data
    close(mar.positions(mar.encoder_pos_embed_learned, grid(golden)), data["und.enc_pos_embed"])
    close(mar.positions(mar.decoder_pos_embed_learned, grid(golden)), data["und.dec_pos_embed"])
    close(mar.positions(mar.diffusion_pos_embed_learned, grid(golden)), data["und.diff_pos_embed"])


# losses


def costs(out, noise, rows, wanted):
    """The loss of every row, and its two parts."""
    mse = (out[:, : noise.shape[1]] - noise).square().mean(1)
    close(rows, wanted["loss"])
    close(mse, wanted["mse"])
    close(rows - mse, wanted["vb"])


def gradients_agree(golden, model, task):
    cases, parameters = golden.cases, dict(model.named_parameters())
    total = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    for name, wanted in cases["grad_norms"][task].items():
        if name == "__total_norm__":
            ours = total
        elif wanted is None:
            assert parameters[name].grad is None, name
            continue
        else:
            ours = parameters[name].grad.norm()
        assert abs(float(ours) - wanted) <= STAGE * wanted, (name, float(ours), wanted)
    without = {n for n, p in parameters.items() if p.grad is None and not n.startswith("codec.")}
    assert without == set(cases["no_grad_params"][task]) - {"mar.class_emb.weight"}  # no parameter here
    for name, wanted in golden.data.items():
        if name.startswith(f"{task}.grad."):
            close(parameters[name.removeprefix(f"{task}.grad.")].grad, wanted)


@pytest.mark.parametrize("task", ["t2i", "reca"])
def test_drawing_loss_and_every_stage_of_it(golden, model, monkeypatch, task):
    data, size = golden.data, grid(golden)[0] * grid(golden)[1]
    given = prompts(golden, task)
    monkeypatch.setattr(loss, "sample_prompts", lambda *_: given)
    spy = Spy(monkeypatch, model)
    model.zero_grad()
    latents = data["vae.latents"][: len(given)]
    features = {"latents": latents, "h_v": latents}
    batch = Batch(task, torch.arange(len(given)), [""] * len(given), features=features)
    term = model(batch, Recorded(golden, task))

    # Here padding stands behind a sequence, there between prompt and image: real rows are compared, in order.
    real = data[f"{task}.llm_attention_mask"].bool()
    lengths = real.sum(1)
    ((_, inputs, hidden),) = spy.seen["language"]
    assert inputs.keys() == {"inputs_embeds", "use_cache"}  # no mask, and positions that count up from 0 …
    ours = torch.arange(inputs["inputs_embeds"].shape[1]) < lengths[:, None]
    positions = torch.arange(ours.shape[1]).expand(ours.shape)[ours]
    assert torch.equal(positions, data[f"{task}.llm_position_ids"][real])  # … as there
    close(inputs["inputs_embeds"][ours], data[f"{task}.llm_inputs_embeds"][real])
    close(hidden.last_hidden_state[ours], data[f"{task}.llm_last_hidden"][real])

    (((encoded, visible, _, _), _, z),) = spy.seen["decode"]
    hides = torch.ones_like(data[f"{task}.mask"]).scatter(1, visible, 0.0)
    assert torch.equal(hides, data[f"{task}.mask"])
    close(encoded, data[f"{task}.x_enc_residual"])
    close(z, data[f"{task}.z"])

    # The head saw hidden rows only; of those, what every row cost, and what all of them did.
    rows = hides.flatten().nonzero()[:, 0]
    repeats = golden.config["mar"]["diffusion_batch_mul"]
    (((x_t, t, condition), _, out),) = spy.seen["head"]
    assert len(x_t) == repeats * len(rows) == term.weight and len(condition) == len(rows)
    every = (torch.arange(repeats)[:, None] * len(hides) * size + rows).flatten()
    assert torch.equal(t, data[f"{task}.t"][every])
    cost = diffusion_loss(
        out.detach(), latents.flatten(0, 2), t, data[f"{task}.noise"][every], diffusion_schedule(),
        rows=rows.repeat(repeats), reduction="none",
    )  # fmt: skip
    costs(out, data[f"{task}.noise"][every], cost, {n: data[f"{task}.row_{n}"][every] for n in ("loss", "mse", "vb")})
    close(term.sum / term.weight, data[f"{task}.loss"])

    (term.sum / term.weight).backward()
    gradients_agree(golden, model, task)


def test_answer_loss_and_every_stage_of_it(golden, model, monkeypatch):
    data = golden.data
    given = []
    for number, row in enumerate(prompts(golden, "i2t")):
        kept = data["i2t.attention_mask"][number].bool() & (data["i2t.input_ids"][number] != -200)
        given.append(row._replace(labels=data["i2t.labels"][number][kept].tolist()))
    monkeypatch.setattr(prompt, "conversation", lambda _, turns: given[turns[0]])
    spy = Spy(monkeypatch, model)
    model.zero_grad()
    features = {"h_v": data["vae.latents"][: len(given)]}
    batch = Batch("i2t", torch.arange(len(given)), [[number] for number in range(len(given))], features=features)
    term = model(batch, CounterRNG(0))
    assert model.prepare(batch, CounterRNG(0)).weight == term.weight

    image = data["und.h_v"].shape[1]
    real = torch.cat((data["i2t.attention_mask"].bool(), torch.ones(len(given), image - 1, dtype=torch.bool)), dim=1)
    real = real.sort(dim=1, descending=True, stable=True).values  # right padded there too
    ((_, inputs, hidden),) = spy.seen["language"]
    close(inputs["inputs_embeds"][real], data["i2t.llm_inputs_embeds"][real])
    close(hidden.last_hidden_state[real], data["i2t.llm_last_hidden"][real])
    close(term.sum / term.weight, data["i2t.loss"])
    (term.sum / term.weight).backward()
    gradients_agree(golden, model, "i2t")


def test_diffusion_head_and_loss(golden, model):
    data, table = golden.data, diffusion_schedule()
    z = data["diff.z"].clone().requires_grad_()
    x0, t, noise, mask = (data[f"diff.{name}"] for name in ("target", "t", "noise", "mask"))
    x_t = diffusion_add_noise(x0, t, noise, table)
    close(x_t, data["diff.x_t"])
    out = model.mar.diffloss.net(x_t, t, z)
    close(out, data["diff.net_out"])
    rows = diffusion_loss(out, x0, t, noise, table, reduction="none")
    costs(out, noise, rows, {n: data[f"diff.row_{n}"] for n in ("loss", "mse", "vb")})
    loss = (rows * mask).sum() / mask.sum()
    close(loss, data["diff.loss"])
    loss.backward()
    close(z.grad, data["diff.grad_z"], GENERATION)


def test_schedules(golden):
    data = golden.data
    torch.testing.assert_close(reference.betas(1000), data["sched.betas_1000"], rtol=1e-9, atol=0)
    assert torch.equal(space_timesteps(1000, 100), data["sched.map_100"])
    respaced = reference.betas(1000, space_timesteps(1000, 100))
    torch.testing.assert_close(respaced, data["sched.betas_100"], rtol=1e-9, atol=0)
    assert torch.equal(space_timesteps(1000, int(golden.config["mar"]["num_sampling_steps"])), data["sched.map_gen"])


def test_what_decays(golden, model):
    ours = {n for n, p in model.named_parameters() if not n.startswith("codec.") and model.decays(n, p)}
    assert ours == set(golden.cases["weight_decay_params"]) - {"mar.class_emb.weight"}


# inference


def test_generation(golden, model, monkeypatch):
    data, c = golden.data, golden.config["generation"]
    given = prompts(golden, "gen")
    spy = Spy(monkeypatch, model)
    images = len(given) // branches(golden)
    latents = sampling.sample_latents(
        model,
        given[:images],
        given[images:],
        RecordedChance(golden),
        grid(golden),
        steps=c["num_iter"],
        guidance=c["cfg"],
        guidance_schedule=c["cfg_schedule"],
        diffusion=int(golden.config["mar"]["num_sampling_steps"]),
        temperature=c["temperature"],
    )
    assert len(spy.seen["encode"]) == len(spy.seen["decode"]) == c["num_iter"]
    for step, (encode, decode) in enumerate(zip(spy.seen["encode"], spy.seen["decode"], strict=True)):
        (tokens, visible), _, _ = encode
        (encoded, seen, _, _), _, z = decode
        mask = torch.ones(len(given), tokens[0, ..., 0].numel()).scatter(1, seen, 0.0)
        assert torch.equal(mask, data[f"gen.{step}.mask_in"])
        assert torch.equal(visible, seen[:images])
        # Ours encodes the images once; the release does so for both branches, which hold the same tokens.
        wanted = data[f"gen.{step}.tokens_in"][:images]
        close(tokens, wanted, GENERATION) if step else close(tokens + 1, wanted + 1)
        close(encoded, data[f"gen.{step}.x_enc_residual"], GENERATION)
        following = data[f"gen.{step + 1}.mask_in"] if step + 1 < c["num_iter"] else torch.zeros_like(mask)
        drawn = mask.bool() & ~following.bool()
        close(z[drawn], data[f"gen.{step}.z_rows"], GENERATION)
        sampled = data[f"gen.{step}.sampled"]
        close(latents.flatten(1, 2)[drawn[:images]], sampled[: len(sampled) // branches(golden)], GENERATION)
    close(latents, data["gen.final_latents"][:images], GENERATION)
    close(model.pixels(latents), data["gen.pixels"], GENERATION)


def test_answers(golden, model):
    data = golden.data
    given = [prompt.Prompt(ids, prompt.SLOT) for ids in data["txt.input_ids"].tolist()]
    encoded = model.mar.encode(data["vae.latents"][: len(given)])
    h_v = model.encode_understanding(encoded)
    layout = prompt.layout(given, golden.config["mar"]["buffer_size"], grid(golden)[0] * grid(golden)[1], side="left")
    logits = model.llm.lm_head(model.states(layout, h_v)[:, -1])
    close(logits, data["txt.logits_last"])
    embeddings = template_concat(model.llm.model.embed_tokens.weight, h_v.detach(), layout.src)
    wanted = data["txt.generated"]
    arguments = embeddings, layout.position_ids(), layout.spans(), wanted.shape[1], -1
    assert torch.equal(planned.greedy(model.llm.model, model.llm.lm_head, *arguments), wanted)
