"""GenEval's rules, colours and detector against figures recorded from the public script, mmdet and clip_benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reca.eval.judges import colors, mask2former
from reca.eval.suites import geneval_rules as rules

EVAL_DATA = Path(__file__).parent / "data"
RECORDED = {
    "rules_file": "rules.json",
    "summary_file": "summary.json",
    "preprocess_file": "preprocess.json",
    "postprocess_file": "postprocess.json",
    "color_file": "color.json",
    "keymap_file": "mask2former_keymap.json",
    "tiny_file": "tiny.json",
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def near(ours, wanted, tolerance):
    assert ours.shape == wanted.shape
    assert float((ours - wanted).abs().max()) <= tolerance


# ---- rules ----


def test_rules(rules_file, monkeypatch):
    cases = read(rules_file)
    assert list(rules.CLASS_NAMES) == cases["class_names"] and list(rules.COLORS) == cases["colors"]
    assert cases["defaults"].pop("max_overlap") == 1  # all boxes are kept
    assert {name: getattr(rules, name.upper()) for name in cases["defaults"]} == cases["defaults"]
    for case in cases["cases"]:
        if "max_overlap" in case["options"]:
            continue
        for name, value in (cases["defaults"] | case["options"]).items():
            monkeypatch.setattr(rules, name.upper(), value)
        detections, metadata = case["detections"], case["metadata"]
        found, threshold = rules.mistakes(detections, metadata), rules.threshold_of(metadata)
        wanted = case["expect"]
        assert (not found) == wanted["correct"], case["id"]
        assert found == wanted["reason_lines"], case["id"]
        boxes = {name: rules.kept_boxes(of_class, threshold) for name, of_class in detections.items()}
        kept = {name: [[*map(float, b.corners), float(b.score)] for b in some] for name, some in boxes.items() if some}
        assert kept == wanted["kept"], case["id"]
        assert json.dumps(case["metadata"]) == wanted["metadata_string"], case["id"]


def test_summary(summary_file):
    for case in read(summary_file):
        lines = (summary_file.parent / case["file"]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        summary = rules.summarize((row["tag"], row["metadata"], row["correct"]) for row in rows)
        wanted = case["expect"]
        assert len(rows) == wanted["total_images"]
        assert f"{summary.images:.2%}" == wanted["percent_images"] + "%"
        assert f"{summary.prompts:.2%}" == wanted["percent_prompts"] + "%"
        assert (summary.images, summary.prompts) == (wanted["fraction_images"], wanted["fraction_prompts"])
        tags = [
            {"tag": tag, "percent": f"{100 * hits / total:.2f}", "correct": hits, "total": total}
            for tag, (hits, total) in summary.tags.items()
        ]
        assert tags == wanted["tags"]
        assert f"{summary.overall:.5f}" == wanted["overall"]


# ---- colours ----


def test_crops(color_file):
    cases, folder = read(color_file), color_file.parent
    assert list(rules.COLORS) == cases["palette"] and cases["default_background"] == colors.BACKGROUND
    for case in cases["crops"]:
        image = Image.open(folder / case["image"])
        mask = np.asarray(Image.open(folder / case["mask"]).convert("L")) > 0 if case["mask"] else None
        if case["options"]:  # of a background or a crop that GenEval does not ask for
            continue
        ours = colors.crop(image, case["box"], mask)
        wanted = Image.open(folder / case["crop"]).convert("RGB")
        assert list(ours.size) == case["crop_size"], case["name"]
        assert np.array_equal(np.asarray(ours), np.asarray(wanted)), case["name"]


def test_color_classifier(color_file):
    tensors = load_file(color_file.parent / "color" / "classifier.safetensors")
    for case in read(color_file)["classifier"]:
        name = case["name"]
        assert colors.texts(case["class_name"]) == case["texts"]
        columns = colors.classifier(tensors[f"{name}.text_embeddings"])
        near(columns, tensors[f"{name}.classifier"], 1e-6)
        logits, answers = colors.classify(tensors[f"{name}.image_embeddings"], columns)
        near(logits, tensors[f"{name}.logits"], 1e-4)
        assert answers == case["colors"], name


# ---- detector ----


def test_preprocessing(preprocess_file):
    cases, tensors = read(preprocess_file), load_file(preprocess_file.with_suffix(".safetensors"))
    assert list(mask2former.MEAN) == cases["mean"] and list(mask2former.STD) == cases["std"]
    for case in cases["cases"]:
        pixels = mask2former.read_rgb(preprocess_file.parent / case["file"])
        values, geometry = mask2former.preprocess(pixels, tuple(case["img_scale"]))
        assert [*geometry.original, 3] == case["ori_shape"]
        assert [*geometry.resized, 3] == case["img_shape"] and [*geometry.padded, 3] == case["pad_shape"]
        near(values, tensors[case["tensor"]], 1e-6)


def test_sizes_of_the_detectors_input(preprocess_file):
    for case in read(preprocess_file)["sizes"]:
        blank = np.zeros((case["height"], case["width"], 3), dtype=np.uint8)
        values, geometry = mask2former.preprocess(blank)
        assert [*geometry.resized, 3] == case["img_shape"] and [*geometry.padded, 3] == case["pad_shape"]
        if case["pad_value"]:
            assert values[:, -1, -1].tolist() == pytest.approx(case["pad_value"], abs=1e-6)


def listed(found):
    """Detections as recorded: sorted by label, then score descending, then box."""
    areas = found.masks.flatten(1).sum(1)
    rows = list(zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), areas.tolist(), strict=True))
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][1], rows[i][2]))
    return [rows[i] for i in order], order


def agree(ours, wanted, tolerance, area):
    """Compare detections; of equal scores (within the tolerance) the order is free."""
    assert len(ours) == len(wanted)
    rest = list(wanted)
    for label, score, box, size in ours:
        match = next(
            w
            for w in rest
            if w["label"] == label and w["box"] == box and abs(w["score"] - score) <= tolerance and w[area] == size
        )
        rest.remove(match)


def test_postprocessing(postprocess_file):
    tensors = load_file(postprocess_file.with_suffix(".safetensors"))
    for case in read(postprocess_file)["cases"]:
        name = case["name"]
        geometry = mask2former.Geometry(*(tuple(case[f"{k}_shape"]) for k in ("ori", "img", "pad")))
        logits = (tensors[f"{name}.{part}_logits"].float() for part in ("class", "mask"))
        found = mask2former.postprocess(*logits, geometry, case["max_per_image"])
        rows, order = listed(found)
        agree(rows, case["detections"], 1e-5, "area")
        if f"{name}.masks_packed" in tensors:
            packed = np.packbits(found.masks[order].flatten(1).numpy(), axis=1)
            wanted = tensors[f"{name}.masks_packed"].numpy()
            assert sorted(map(bytes, packed)) == sorted(map(bytes, wanted)), name


def test_keys_of_the_detector(keymap_file):
    """Every weight of mmdet's model goes where the key map says, and every one of transformers' is filled."""
    keymap = read(keymap_file)
    state = {source: torch.zeros(shape) for _, source, shape, _ in keymap["rows"]}
    converted = mask2former.convert(state)
    wanted = {name: shape for *_, targets in keymap["rows"] for name, shape in targets}
    assert {name: list(value.shape) for name, value in converted.items()} == wanted
    for _, source, shape, targets in keymap["rows"]:  # which weight goes where
        one = mask2former.convert({source: torch.zeros(shape)})
        assert sorted(one) == sorted(name for name, _ in targets), source


def test_order_of_reordered_weights(keymap_file):
    for operation, source, shape, targets in read(keymap_file)["rows"]:
        if operation in ("split3", "unfold_columns"):
            value = torch.arange(float(np.prod(shape))).reshape(shape)
            found = mask2former.convert({source: value})
            if operation == "split3":
                wanted = value.chunk(3)
            else:
                c = shape[-1] // 4
                columns = [ch * 4 + 2 * (j % 2) + j // 2 for j in range(4) for ch in range(c)]
                wanted = [value[..., columns]]
            for (name, _), part in zip(targets, wanted, strict=True):
                assert torch.equal(found[name], part), name


def test_the_published_sizes(keymap_file):
    """The model of transformers that is built for the published weights has the keys of the map."""
    from transformers import Mask2FormerForUniversalSegmentation

    keymap = read(keymap_file)
    wanted = {name: shape for *_, targets in keymap["rows"] for name, shape in targets}
    wanted |= dict(keymap["target_without_source"])
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(mask2former.configuration())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == wanted


def tiny_sizes(tiny_file):
    """The sizes of the small detector, as arguments of `configuration`."""
    sizes = read(tiny_file)["config"]
    return dict(
        swin={"embed_dim": sizes["embed_dims"], "depths": sizes["depths"], "num_heads": sizes["num_heads"]},
        num_labels=sizes["num_classes"], num_queries=sizes["num_queries"], feature_size=sizes["feat_channels"],
        mask_feature_size=sizes["out_channels"], hidden_dim=sizes["feat_channels"],
        encoder_layers=sizes["encoder_layers"], encoder_feedforward_dim=sizes["encoder_ffn"],
        decoder_layers=sizes["decoder_layers"] + 1, dim_feedforward=sizes["decoder_ffn"],
        num_attention_heads=sizes["num_attention_heads"],
    )  # fmt: skip


def tiny_model(tiny_file):
    config = mask2former.configuration(**tiny_sizes(tiny_file))
    return mask2former.build(load_file(tiny_file.parent / "tiny_mmdet_weights.safetensors"), config)


def test_detector_of_a_tiny_size(tiny_file):
    cases, model = read(tiny_file), tiny_model(tiny_file)
    data = load_file(tiny_file.parent / "tiny_outputs.safetensors")
    for name, case in cases["cases"].items():
        with torch.no_grad():
            found = model(pixel_values=data[f"{name}.image"].float(), output_hidden_states=True,
                          output_auxiliary_logits=True)  # fmt: skip
        for i, features in enumerate(found.encoder_hidden_states):
            near(features, data[f"{name}.backbone.{i}"], 5e-6)
        for i, features in enumerate(found.pixel_decoder_hidden_states):
            near(features, data[f"{name}.pixel_decoder.{i}"], 5e-5)
        auxiliary = [part["class_queries_logits"] for part in found.auxiliary_logits]
        logits = [*auxiliary, found.class_queries_logits]
        assert len(logits) == case["layers"]
        for i, value in enumerate(logits):
            near(value, data[f"{name}.class_logits.{i}"], 5e-5)
        near(found.masks_queries_logits, data[f"{name}.mask_logits.last"], 2e-4)


def test_detector_from_file_to_boxes(tiny_file):
    cases, model = read(tiny_file), tiny_model(tiny_file)
    for case in cases["end_to_end"]:
        pixels = mask2former.read_rgb(tiny_file.parent / case["file"])
        found = mask2former.Detector(model, img_scale=tuple(case["img_scale"]))(
            pixels, cases["config"]["max_per_image"]
        )
        agree(listed(found)[0], case["detections"], 1e-4, "mask_area")
