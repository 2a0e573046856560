"""Every stage of Show-o against the public code: image tokenizer, CLIP, prompts, masks, losses, gradients, sampling."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reca.data.batch import Batch
from reca.models.show_o import Adapter, prompt, sampling
from reca.models.show_o.conditioner import CodeConditioner
from reca.models.show_o.config import ClipSizes, MagvitSizes, PhiSizes, ShowOConfig
from reca.models.show_o.masking import cosine, sample_mask
from reca.models.show_o.prompt import image_rows
from reca_kernels import IGNORE_INDEX, AttentionSpan, TextSegment
from tests.golden.show_o import (
    LOGITS,
    allowed_keys,
    clip,
    close_rows,
    ids,
    kept,
    mean,
    mean_loss,
    predicted,
    recorded,
    same_features,
    same_ids,
    same_mask,
    same_norms,
    stripped,
    write_folders,
)

DROP = 0.3  # condition dropout of the golden data
ZERO = "k_layernorm.bias"  # no gradient but of the rotary part: the rest moves all keys alike
NOISE = 1e-7  # of a gradient's element that is zero: 1e-8 was seen, on other data 2e-8
RECON_VQ = ("recon_vq", "recon_vq_blur")


def matches(config: dict) -> bool:
    return {"showo", "phi", "magvitv2", "clip"} <= config.keys()


def recipe(config: dict, folder) -> ShowOConfig:
    phi, clip, vq = config["phi"], config["clip"], config["magvitv2"]
    assert vq["encoder"]["z_channels"] == vq["decoder"]["z_channels"]
    return ShowOConfig(
        weights=str(folder),
        phi=PhiSizes(**{name: phi[name] for name in PhiSizes.__dataclass_fields__}),
        clip=ClipSizes(**{name: clip[name] for name in ClipSizes.__dataclass_fields__}),
        magvit=MagvitSizes(
            vq["encoder"]["ch"],
            vq["encoder"]["ch_mult"],
            vq["encoder"]["num_res_blocks"],
            vq["decoder"]["ch_mult"],
            vq["decoder"]["num_res_blocks"],
            vq["encoder"]["z_channels"],
        ),
        parity=True,
        image_size=config["image_size"],
        hv_down_scale=config["image_size"] // config["cond_image_size"],
        max_text_tokens=config["max_text_len"],
        max_prompt_tokens=config["max_text_len"],
        max_reca_tokens=config["recon_clip_pad_length"],
        caption_drop=DROP,
    )


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    config = golden.config
    folder = write_folders(
        tmp_path_factory.mktemp("show_o"),
        {key: config["showo"][key] for key in config["showo"] if key != "num_new_special_tokens"},
        golden.part("showo_model."),
        golden.part("magvitv2."),
        golden.part("clip."),
        config["showo"]["llm_vocab_size"],
    )
    return Adapter.load(recipe(config, folder))


@pytest.fixture
def model(loaded, monkeypatch):
    """The loaded model as it was, without gradients, and with texts that are not wrapped into a chat."""
    monkeypatch.setattr(prompt, "TEMPLATE", "{}")
    config = loaded.config
    loaded.zero_grad()
    yield loaded
    loaded.config = config


def understand_with(model, source: str, **changes) -> None:
    model.config = replace(model.config, understanding=source, **changes)


def pixels_of(golden, case: str):
    return golden.data[f"{case}.pixels"]


def codes_of(golden, model, case: str):
    """The images of a case, int64 [B, N], read from what is hidden of them and what is not. Cases differ in B."""
    v, ids, labels = model.vocabulary, golden.data[f"{case}.masked_ids"], golden.data[f"{case}.mask_labels"]
    return torch.where(ids == v.mask, labels, ids) - v.offset


def reca(golden, model, case: str):
    """(batch with features, rng) of a reconstruction case."""
    data, texts = golden.data, ids(golden.cases["tensors"]["recon.texts"]["value"])
    codes = codes_of(golden, model, case)
    words = [" ".join(map(str, text)) for text in texts]
    if case == "recon_clip":
        h_v = data["und.clip_feat"]
    else:
        h_v = data["und.vq_small_codes" if case == "recon_vq" else "und.vq_blur_codes"]
        words = words[:1] * len(codes)  # one template per micro-batch
        model.config = replace(model.config, hv_source="vq", hv_resize_back=case == "recon_vq_blur")
    features = {"codes": codes, "h_v": h_v[: len(codes)]}
    return Batch("reca", torch.arange(len(codes)), words[: len(codes)], features=features), recorded(golden, case)


def reca_layout(golden, model, case: str) -> prompt.Layout:
    return predicted(model, *reca(golden, model, case))


def t2i_layout(golden, model) -> prompt.Layout:
    drop = (golden.data["t2i.rand_drop"] < DROP).tolist()
    texts = [[] if d else t for t, d in zip(ids(golden.cases["tensors"]["t2i.texts"]["value"]), drop, strict=True)]
    samples = [prompt.t2i(t, model.vocabulary, model.config.max_text_tokens, model.image_tokens) for t in texts]
    layout = prompt.layout(samples, model.vocabulary)
    rng = recorded(golden, "t2i")
    masked = sample_mask(rng, torch.arange(len(texts)), model.image_tokens)
    return prompt.apply_mask(layout, codes_of(golden, model, "t2i"), masked, model.vocabulary)


def lm_layout(golden, model) -> prompt.Layout:
    v = model.vocabulary
    texts = [row[1:-1] for row in stripped(golden.data["lm.input_ids"], v.pad)]
    rows = [prompt.add_bos_eos(text, v, golden.data["lm.input_ids"].shape[1]) for text in texts]
    samples = [
        prompt.Sample([TextSegment(row, [*row[1:], IGNORE_INDEX])], [AttentionSpan(len(row), "causal")]) for row in rows
    ]
    return prompt.layout(samples, v)


def i2t_vq_layout(golden, model) -> prompt.Layout:
    v, wanted = model.vocabulary, golden.data["mmu_vq.input_ids"]
    texts = [row[model.image_tokens + 3 :] for row in stripped(wanted, v.pad)]
    return prompt.layout([prompt.i2t_vq(text, text, v, model.image_tokens) for text in texts], v)


def i2t_clip_layout(golden, model) -> prompt.Layout:
    data, v = golden.data, model.vocabulary
    samples = []
    for row, system in enumerate(data["mmu_clip.system_ids"].tolist()):
        (text,) = stripped(data["mmu_clip.text_ids"][row : row + 1], v.pad)
        labels = data["mmu_clip.text_labels"][row, : len(text)].tolist()
        samples.append(prompt.i2t_clip(text, labels, v, system, clip(model).tokens()))
    return prompt.layout(samples, v)


# pixels -> codes, pixels -> h_v


def test_codec_encodes(golden, model):
    with torch.no_grad():
        z = model.codec.encoder(golden.data["vq.pixels"])
    torch.testing.assert_close(z, golden.data["vq.z"], rtol=0, atol=LOGITS)
    assert torch.equal(model.codec.encode(golden.data["vq.pixels"]), golden.data["vq.codes"])


def test_codec_decodes(golden, model):
    data, codec = golden.data, model.codec
    torch.testing.assert_close(codec.quantize.entries(data["vq.codes"], *data["vq.zq"].shape[2:]), data["vq.zq"])
    torch.testing.assert_close(codec.decode(data["vq.codes"]), data["vq.decoded"], rtol=0, atol=LOGITS)
    grid = [side // codec.factor for side in data["vq.rect_decoded"].shape[2:]]
    ours = codec.decode(data["vq.rect_codes"], tuple(grid))
    torch.testing.assert_close(ours, data["vq.rect_decoded"], rtol=0, atol=LOGITS)


def test_clip_features_and_projection(golden, model):
    data = golden.data
    seen = clip(model).reca_pixels(data["vq.pixels"])
    torch.testing.assert_close(seen, data["und.clip_pixels"], rtol=0, atol=1e-6)
    with torch.no_grad():
        features = clip(model).encode_understanding(seen)
        same_features(features, data["und.clip_feat"])
        same_features(model.visual(features), data["und.h_v"])


@pytest.mark.parametrize("case", ["small", "blur"])
def test_condition_codes(golden, model, case):
    data = golden.data
    if case == "blur":
        model.config = replace(model.config, hv_down_scale=golden.config["blur_down_scale"], hv_resize_back=True)
    shrunk = CodeConditioner(model.config, model.image_tokens, model.codec).reca_pixels(data["vq.pixels"])
    torch.testing.assert_close(shrunk, data[f"und.vq_{case}_pixels"], rtol=0, atol=1e-6)
    assert torch.equal(model.codec.encode(shrunk), data[f"und.vq_{case}_codes"])


# masking


def test_schedule(golden):
    torch.testing.assert_close(cosine(golden.data["sched.t"]), golden.data["sched.cosine"], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["t2i", "recon_clip", *RECON_VQ])
def test_masking(golden, model, case):
    data, v, codes = golden.data, model.vocabulary, codes_of(golden, model, case) + model.vocabulary.offset
    rng, samples = recorded(golden, case), torch.arange(len(codes))
    masked = sample_mask(rng, samples, model.image_tokens)
    assert torch.equal(torch.where(masked, v.mask, codes), data[f"{case}.masked_ids"])
    assert torch.equal(torch.where(masked, codes, -100), data[f"{case}.mask_labels"])
    torch.testing.assert_close(cosine(data[f"{case}.rand_t"]), data[f"{case}.mask_prob"], rtol=0, atol=1e-7)


# sequences


def test_special_ids(golden, model):
    special, v = golden.config["special_ids"], model.vocabulary
    for name in ("soi", "eoi", "t2i", "mmu", "pad"):
        assert getattr(v, name) == special[f"<|{name}|>"]
    assert (v.bos, v.eos) == (special["<|sot|>"], special["<|eot|>"])
    assert (v.offset, v.mask) == (golden.config["image_token_offset"], golden.config["showo"]["mask_token_id"])


def test_t2i_sequence(golden, model):
    layout, data = t2i_layout(golden, model), golden.data
    same_ids(layout, data["t2i.input_ids"], model.vocabulary)
    same_mask(layout, data["t2i.allowed"])
    counted = data["t2i.labels"][:, model.config.max_text_tokens + 1 :]
    assert torch.equal(layout.labels[:, -counted.shape[1] :], counted)
    assert (layout.labels[:, : -counted.shape[1]] == -100).all()


def test_lm_sequence(golden, model):
    layout, data = lm_layout(golden, model), golden.data
    same_ids(layout, data["lm.input_ids"], model.vocabulary)
    same_mask(layout, data["lm.allowed"])
    same_shifted_labels(layout, data["lm.labels"])


def test_i2t_vq_sequence(golden, model):
    layout, data = i2t_vq_layout(golden, model), golden.data
    codes = model.codec.encode(pixels_of(golden, "mmu_vq")) + model.vocabulary.offset
    same_mask(layout, data["mmu_vq.allowed"])
    same_shifted_labels(layout, data["mmu_vq.labels"])
    layout.src[layout.src < 0] = codes.flatten().int()
    same_ids(layout, data["mmu_vq.input_ids"], model.vocabulary)


def test_i2t_clip_sequence(golden, model):
    layout, data, v = i2t_clip_layout(golden, model), golden.data, model.vocabulary
    same_mask(layout, data["mmu_clip.allowed"])
    same_shifted_labels(layout, data["mmu_clip.labels"])
    with torch.no_grad():
        embeddings = model.embed(layout.src, clip(model).encode_understanding(pixels_of(golden, "mmu_clip")))
    close_rows(embeddings, data["mmu_clip.input_embeds"], layout)
    assert (layout.src[:, 0] >= 0).all() and v.mmu in layout.src[:, 0]


def same_shifted_labels(layout, labels) -> None:
    """Our labels stand at the row that predicts them, one before the release's."""
    for row, (rows, positions) in enumerate(kept(layout)):
        assert torch.equal(layout.labels[row, rows[:-1]], labels[row, positions[:-1] + 1])
        assert (labels[row] != -100).sum() == (layout.labels[row] != -100).sum() + (labels[row, 0] != -100)


def test_reca_clip_sequence(golden, model):
    layout, data = reca_layout(golden, model, "recon_clip"), golden.data
    same_ids(layout, data["recon_clip.full_ids"], model.vocabulary, clip(model).tokens())
    same_mask(layout, data["recon_clip.allowed"])
    assert torch.equal(
        layout.labels[:, image_rows(model.image_tokens)], data["recon_clip.labels"][:, image_rows(model.image_tokens)]
    )
    with torch.no_grad():
        h_v = data["und.clip_feat"][: len(layout.src)]
        close_rows(model.embed(layout.src, h_v), data["recon_clip.input_embeds"], layout)


@pytest.mark.parametrize("case", RECON_VQ)
def test_reca_vq_sequence(golden, model, case):
    layout, data = reca_layout(golden, model, case), golden.data
    features = reca(golden, model, case)[0].features
    same_mask(layout, data[f"{case}.allowed"])
    assert torch.equal(
        layout.labels[:, image_rows(model.image_tokens)], data[f"{case}.labels"][:, image_rows(model.image_tokens)]
    )
    layout.src[layout.src < 0] = (features["h_v"] + model.vocabulary.offset).flatten().int()
    same_ids(layout, data[f"{case}.input_ids"], model.vocabulary)


# hidden states, logits


def test_t2i_hidden_states(golden, model):
    layout, data = t2i_layout(golden, model), golden.data
    first = []
    hook = model.blocks()[0].register_forward_hook(lambda _module, _args, out: first.append(out))
    with torch.no_grad():
        close_rows(model.embed(layout.src, None), data["t2i.embeddings"], layout, 0)
        close_rows(model.hidden(layout), data["t2i.final_hidden"], layout, LOGITS)
    hook.remove()
    (rows,), places = first[0], layout.places()
    if places is not None:  # the model has left out the padding
        rows = rows.new_zeros(layout.src.numel(), rows.shape[1]).index_copy(0, places, rows)
    close_rows(rows.view(*layout.src.shape, -1), data["t2i.hidden_layer1"], layout, LOGITS)


@torch.no_grad()
def test_joint_logits(golden, model):
    data, head = golden.data, model.showo.lm_head
    understand_with(model, "vq")
    t2i, lm, i2t = t2i_layout(golden, model), lm_layout(golden, model), i2t_vq_layout(golden, model)
    codes = model.codec.encode(pixels_of(golden, "mmu_vq"))
    rows = data["joint_vq.logits"].split([len(part.src) for part in (t2i, lm, i2t)])
    for layout, h_v, wanted in zip((t2i, lm, i2t), (None, None, codes), rows, strict=True):
        close_rows(head(model.hidden(layout, h_v)), wanted, layout, LOGITS)


@torch.no_grad()
def test_i2t_clip_logits(golden, model):
    layout = i2t_clip_layout(golden, model)
    ours = model.showo.lm_head(model.hidden(layout, clip(model).encode_understanding(pixels_of(golden, "mmu_clip"))))
    close_rows(ours, golden.data["mmu_clip.logits"], layout, LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("case", ["recon_clip", *RECON_VQ])
def test_reca_logits(golden, model, case):
    layout = reca_layout(golden, model, case)
    features = reca(golden, model, case)[0].features
    ours = model.showo.lm_head(model.hidden(layout, features["h_v"])[:, image_rows(model.image_tokens)])
    torch.testing.assert_close(ours, golden.data[f"{case}.img_logits"], rtol=0, atol=LOGITS)


# losses, gradients, an update


def same_loss(ours, wanted) -> None:
    torch.testing.assert_close(ours.detach(), wanted[0], rtol=0, atol=2e-6)


def test_joint_loss_and_gradients(golden, model):
    """Show-o's pre-training mix: t2i + 0.1 lm + i2t."""
    data = golden.data
    texts = golden.cases["tensors"]["t2i.texts"]["value"]
    features = {"codes": codes_of(golden, model, "t2i")}
    batch = Batch("t2i", torch.arange(len(texts)), texts, features=features)
    rng = recorded(golden, "t2i")
    t2i = model(batch, rng)
    assert t2i.weight == model.prepare(batch, rng).weight
    understand_with(model, "vq")
    layout = lm_layout(golden, model)
    lm = mean_loss(model, layout)
    layout = i2t_vq_layout(golden, model)
    i2t = mean_loss(model, layout, model.codec.encode(pixels_of(golden, "mmu_vq")))
    for name, loss in {"t2i": mean(t2i), "lm": lm, "mmu": i2t}.items():
        same_loss(loss, data[f"joint_vq.loss_{name}"])
    (mean(t2i) + 0.1 * lm + i2t).backward()
    same_norms(model, golden.cases["grad_norms"]["joint_vq(t2i+0.1lm+mmu)"])


def i2t_clip_loss(golden, model):
    layout = i2t_clip_layout(golden, model)
    with torch.no_grad():
        features = clip(model).encode_understanding(pixels_of(golden, "mmu_clip"))
    return mean_loss(model, layout, features)


def test_i2t_clip_loss_and_gradients(golden, model):
    loss = i2t_clip_loss(golden, model)
    same_loss(loss, golden.data["mmu_clip.loss"])
    loss.backward()
    same_norms(model, golden.cases["grad_norms"]["mmu_clip"])


RECA = {
    "recon_clip upstream (embeddings built under no_grad)": ("recon_clip", True),
    "recon_clip full graph (embed_tokens and mm_projector in graph)": ("recon_clip", False),
    "recon_vq": ("recon_vq", True),
    "recon_vq_blur": ("recon_vq_blur", True),
}


@pytest.mark.parametrize("name", RECA)
def test_reca_loss_and_gradients(golden, model, name):
    case, parity = RECA[name]
    model.config = replace(model.config, parity=parity)
    batch, rng = reca(golden, model, case)
    term = model(batch, rng)
    assert term.weight == model.prepare(batch, rng).weight
    same_loss(mean(term), golden.data[f"{case}.loss"])
    mean(term).backward()
    same_norms(model, golden.cases["grad_norms"][name])


def test_update(golden, model):
    """One AdamW step of the release's objective, decay on everything that is no bias."""
    total = i2t_clip_loss(golden, model) + mean(model(*reca(golden, model, "recon_clip")))
    same_loss(total, golden.data["total.loss"])
    total.backward()
    same_norms(model, golden.cases["grad_norms"]["total (mmu_clip in graph + recon_clip under no_grad embeddings)"])

    trained = {n: p for n, p in model.named_parameters() if n.startswith(("showo.", "mm_projector."))}
    before = {n: p.detach().clone() for n, p in trained.items()}
    groups = [
        {"params": [p for n, p in trained.items() if model.decays(n, p) == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    lr, eps = 1e-2, 1e-4
    torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=eps).step()
    wanted = golden.cases["adamw_step"]["params"]
    assert wanted.keys() == trained.keys()
    try:
        for name, (norm, total) in wanted.items():
            after = trained[name].detach().double()
            # Of a gradient that is zero the step makes lr / eps times what rounding left of it, in any direction.
            noise = lr / eps * NOISE if name.endswith(ZERO) else 0.0
            n = after.numel()
            assert float(after.norm()) == pytest.approx(norm, rel=1e-6, abs=noise * n**0.5), name
            assert float(after.sum()) == pytest.approx(total, abs=1e-6 * n**0.5 + 1e-5 + noise * n), name
    finally:
        with torch.no_grad():
            for name, value in before.items():
                trained[name].copy_(value)


# inference


class Replayed(sampling.SamplerNoise):
    def __init__(self, golden):
        self.drawn, self.noise = golden.data["gen.step_multinomial"], golden.data["gen.step_gumbel"]

    def codes(self, step, probabilities):
        return self.drawn[step]

    def gumbel(self, step, n):
        return self.noise[step]


def test_generation(golden, model, monkeypatch):
    data, asked, v = golden.data, golden.config["generation"], model.vocabulary
    seen, logits, layouts = [], [], []
    forward, split = model.code_logits, prompt.split_image

    def observed(prompts, image, codes):
        seen.append(codes + v.offset)
        logits.append(forward(prompts, image, codes))
        return logits[-1]

    monkeypatch.setattr(model, "code_logits", observed)
    monkeypatch.setattr(prompt, "split_image", lambda layout, n: (layouts.append(layout), split(layout, n))[1])
    codes = sampling.sample_codes(
        model,
        ids(golden.cases["tensors"]["gen.prompts"]["value"]),
        Replayed(golden),
        steps=asked["timesteps"],
        guidance=asked["guidance_scale"],
        temperature=asked["temperature"],
    )
    layouts[0].src[:, image_rows(model.image_tokens)] = v.mask
    same_ids(layouts[0], torch.cat((data["gen.input_ids"], data["gen.uncond_input_ids"])), v)
    same_mask(layouts[0], data["gen.allowed"])
    wanted = data["gen.step0_img_logits"][..., v.offset : v.mask]
    torch.testing.assert_close(logits[0], wanted, rtol=0, atol=LOGITS)
    for step, given in enumerate(data["gen.step_model_input"]):
        assert torch.equal(seen[step], given[:, image_rows(model.image_tokens)])
    assert torch.equal(codes, data["gen.final_codes"])
    torch.testing.assert_close(model.codec.decode(codes), data["gen.final_pixels"], rtol=0, atol=LOGITS)


def test_answer_from_codes(golden, model):
    """The prompt once alone and once in a batch with a longer one must go on alike."""
    v, wanted, data = model.vocabulary, golden.data["mmu_gen_vq.tokens"], golden.data
    (prompt_ids,) = data["mmu_gen_vq.input_ids"].tolist()
    n, text = model.image_tokens, prompt_ids[model.image_tokens + 3 :]
    codes = torch.tensor([prompt_ids[2 : 2 + n]]) - v.offset
    for texts in ([text], [text, [*text, *text]]):
        layout = prompt.layout([prompt.i2t_vq(t, [-100] * len(t), v, n) for t in texts], v)
        embeddings = model.embed(layout.src, codes.repeat(len(texts), 1)).detach()
        assert torch.equal(sampling.greedy(model, embeddings, layout, len(wanted))[0], wanted)


def test_answer_from_clip(golden, model):
    v, wanted, given = model.vocabulary, golden.data["mmu_gen_clip.tokens"], golden.data["mmu_gen_clip.prompt_embeds"]
    system = golden.config["system_prompt_len"]
    text = given.shape[1] - (system + clip(model).tokens() + 3)
    layout = prompt.layout(
        [prompt.i2t_clip([0] * text, [-100] * text, v, [0] * system, clip(model).tokens()) for _ in given], v
    )
    assert torch.equal(sampling.greedy(model, given, layout, len(wanted)).flatten(), wanted)
    table = model.showo.model.embed_tokens.weight
    for row, token in ((0, v.mmu), (1 + system, v.soi), (2 + system + clip(model).tokens(), v.eoi)):
        assert torch.equal(given[0, row], table[token])


# the masks of the published sizes

TEXT = list(range(100, 137))
VISUAL = 576
REAL = {
    "t2i_512_maxtext576": lambda v: prompt.t2i(TEXT, v, 576, 1024),
    "recon_clip_512": lambda v: prompt.reca_clip(TEXT, v, 128, VISUAL, 1024),
    "recon_clip_256": lambda v: prompt.reca_clip(TEXT, v, 128, VISUAL, 256),
    "recon_vq_512_cond256": lambda v: prompt.reca_vq(TEXT, v, 381, 256, 1024),
    "mmu_vit_1603": lambda v: prompt.i2t_clip([0] * 996, [-100] * 996, v, [0] * 28, VISUAL),
}


@pytest.mark.parametrize("name", REAL)
def test_real_size_masks(golden, name):
    if f"real_mask.{name}.ids" not in golden.data:
        pytest.skip("this folder has no masks of the published sizes")
    wanted = {key: golden.data[f"real_mask.{name}.{key}"].long() for key in ("ids", "row_sums", "col_sums")}
    v = prompt.Vocabulary(50295, 50296, 50297, 50300, 50301, 50256, 50256, 50305, 8192)
    layout = prompt.layout([REAL[name](v)], v)
    ((rows, positions),) = kept(layout)
    assert len(positions) + int((wanted["ids"] == v.pad).sum()) == len(wanted["ids"])
    if name != "mmu_vit_1603":  # that one comes without ids
        token = (layout.src[0, rows] >= 0) & (layout.src[0, rows] != v.mask)
        assert torch.equal(layout.src[0, rows][token].long(), wanted["ids"][positions[token]])
    ours = allowed_keys(layout.runs[0])
    assert torch.equal(ours.sum(1)[rows], wanted["row_sums"][positions])
    pads_behind = F.pad((wanted["ids"] == v.pad).flip(0).cumsum(0).flip(0), (0, 1))[positions + 1]
    assert torch.equal(ours.sum(0)[rows] + pads_behind, wanted["col_sums"][positions])
