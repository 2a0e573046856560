"""The rules of GenEval: from detections in an image to its mistakes, and from verdicts to the benchmark's metrics.

Source: djghosh13/geneval, evaluation/evaluate_images.py and summary_scores.py. Arithmetic is in float32, as there.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# The COCO classes in COCO's order, three of them renamed as in GenEval.
CLASS_NAMES = tuple(
    name.strip()
    for name in """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
    umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
    orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
    book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".split(",")
)


# Thresholds of the public script.
THRESHOLD = 0.3  # minimum score of a detection
COUNTING_THRESHOLD = 0.9  # the same for the tag "counting"
MAX_OBJECTS = 16  # maximum number of objects per class
POSITION_THRESHOLD = 0.1  # minimum offset for a position relation, relative to the sum of the objects' sizes


class Box(NamedTuple):
    """One detection: corners in pixels, score, and its classified colour; None if it was not classified."""

    corners: np.ndarray  # float32 [4]: x0, y0, x1, y1
    score: np.float32
    color: str | None


def threshold_of(metadata: Mapping[str, Any]) -> float:
    """Return the score above which detections count for a prompt."""
    return COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD


def mistakes(detections: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Mapping[str, Any]) -> list[str]:
    """Judge an image by GenEval's rules. Return a line for each mistake; [] if the image is correct.

    detections: for each class, in the detector's order, {"box": [x0, y0, x1, y1], "score": s, "color": name}.
    metadata: that of the prompt, with `tag`, `include` and `exclude`.
    """
    kept = {name: kept_boxes(boxes, threshold_of(metadata)) for name, boxes in detections.items()}
    found: list[str] = []
    groups: list[list[Box] | None] = []  # boxes of each entry; None for one that failed
    for wanted in metadata.get("include", []):
        group, mistake = _include(wanted, kept, groups)
        groups.append(None if mistake else group)
        found += [mistake] if mistake else []
    for wanted in metadata.get("exclude", []):
        name, count = wanted["class"], wanted["count"]
        if (seen := len(kept.get(name, []))) >= count:
            found.append(f"expected {name}<{count}, found {seen}")
    return found


def kept_boxes(boxes: Sequence[Mapping[str, Any]], threshold: float) -> list[Box]:
    """Return the boxes of a class at `kept_places`."""
    scores = np.array([box["score"] for box in boxes], dtype=np.float32)
    return [
        Box(np.asarray(boxes[i]["box"], dtype=np.float32), scores[i], boxes[i].get("color"))
        for i in kept_places(scores, threshold)
    ]


def kept_places(scores: Any, threshold: float) -> list[int]:
    """Return the indices of the highest MAX_OBJECTS scores above the threshold. Of equal scores the later is first."""
    found = np.asarray(scores, dtype=np.float32)
    order = np.argsort(found, kind="stable")[::-1]
    return [int(i) for i in order if found[i] > np.float32(threshold)][:MAX_OBJECTS]


def _include(
    wanted: Mapping[str, Any], kept: Mapping[str, list[Box]], groups: Sequence[list[Box] | None]
) -> tuple[list[Box], str]:
    """Check an entry of `include`. Return its boxes and the mistake, empty if there is none.

    groups: boxes of each preceding entry; None for one that failed.
    """
    name, count = wanted["class"], wanted["count"]
    found = kept.get(name, [])[:count]
    if len(found) < count:
        return found, f"expected {name}>={count}, found {len(found)}"
    if "color" in wanted:
        color, colors = wanted["color"], [box.color for box in found]
        hits = colors.count(color)
        if hits < count:
            seen = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
            return found, f"expected {color} {name}>={count}, found {hits} {color}; and {seen}"
    if wanted.get("position"):
        relation, index = wanted["position"]
        targets = groups[index]
        if targets is None:
            return found, f"no target for {name} to be {relation}"
        for box in found:
            for target in targets:
                shown = relations(box.corners, target.corners)
                if relation not in shown:
                    return found, f"expected {name} {relation} target, found {' and '.join(sorted(shown))} target"
    return found, ""


def relations(a: np.ndarray, b: np.ndarray) -> set[str]:
    """Return the position of box a relative to box b: up to two of "left of", "right of", "above", "below"."""
    a, b = a.reshape(2, 2), b.reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(np.diff(a, axis=0))[0] + np.abs(np.diff(b, axis=0))[0]
    revised = np.maximum(np.abs(offset) - np.float32(POSITION_THRESHOLD) * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    x, y = revised / np.linalg.norm(offset)
    shown = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in shown.items() if holds}


class Summary(NamedTuple):
    """The metrics of summary_scores.py."""

    images: float  # fraction of correct images
    prompts: float  # fraction of prompts with a correct image; prompts with equal metadata count as one
    tags: dict[str, tuple[int, int]]  # tag -> correct images, images; in order of first appearance

    @property
    def overall(self) -> float:
        """Return the unweighted mean over the tags."""
        return sum(hits / count for hits, count in self.tags.values()) / len(self.tags)


def summarize(rows: Iterable[tuple[str, str, bool]]) -> Summary:
    """Summarise verdicts. rows: (tag, metadata string, correct) of each image, in the order of the result file."""
    tags: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    prompts: dict[str, bool] = {}
    for tag, metadata, correct in rows:
        tags[tag][0] += bool(correct)
        tags[tag][1] += 1
        prompts[metadata] = prompts.get(metadata, False) or bool(correct)
    if not tags:
        raise ValueError("there are no verdicts to summarise")
    count = sum(total for _, total in tags.values())
    return Summary(
        sum(hits for hits, _ in tags.values()) / count,
        sum(prompts.values()) / len(prompts),
        {tag: (hits, total) for tag, (hits, total) in tags.items()},
    )
