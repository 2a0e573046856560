"""Judges of GenEval: its own detector, and two approximate ones from transformers. They need weight files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reca.eval.errors import EvaluationError
from reca.eval.judges import mask2former
from reca.eval.judges.base import Judge
from reca.eval.judges.colors import CLIP, ColorClassifier, load_clip
from reca.eval.suites.geneval_rules import CLASS_NAMES, Options, kept_places

RECORDED_SCORE = 0.05  # weaker detections count under no threshold in use, and are not recorded
DTYPE = "float32"


class DetectorJudge(Judge):
    """Finds objects of GenEval's 80 classes, and names the colours of those whose colour is asked."""

    kind = "detector"
    dtype = DTYPE
    colors: ColorClassifier

    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        """Return (class, box, score, mask or None) of every object in uint8 [H, W, 3]."""
        raise NotImplementedError

    def detect(self, picture: Path, colored: Mapping[str, int], threshold: float) -> dict[str, list[dict[str, Any]]]:
        pixels = mask2former.read_rgb(picture)
        found: dict[str, list[dict[str, Any]]] = {}
        masks: dict[str, list[np.ndarray | None]] = {}
        for name, box, score, mask in self.find(pixels):
            if score >= RECORDED_SCORE:
                found.setdefault(name, []).append({"box": box, "score": score})
                masks.setdefault(name, []).append(mask)
        image = Image.fromarray(pixels)
        for name, count in colored.items():
            boxes = found.get(name, [])
            places = kept_places([box["score"] for box in boxes], threshold, Options().max_objects)[:count]
            colors = self.colors(image, name, [boxes[i]["box"] for i in places], [masks[name][i] for i in places])
            for place, color in zip(places, colors, strict=True):
                boxes[place]["color"] = color
        return found


class Mask2FormerJudge(DetectorJudge):
    """GenEval's detector: OpenMMLab's Mask2Former swin-s, with CLIP ViT-L/14 for colours, in float32.

    Published numbers were made on CUDA, where CLIP runs in half precision: near ties of colours can differ.
    """

    exact = True
    version = "mmdet 2.28.2 in transformers, 1"

    def __init__(self, source: str, device: torch.device | str, *, clip: str = CLIP):
        path = Path(source).expanduser()
        model = mask2former.build(mask2former.load_checkpoint(path), mask2former.configuration())
        self.detector = mask2former.Detector(model, device)
        self.colors = load_clip(clip, device)
        self.name = f"mask2former:{path.name}+{Path(clip).name}"

    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        found = self.detector(pixels)
        return [
            (CLASS_NAMES[int(label)], box.tolist(), float(score), mask.numpy())
            for label, score, box, mask in zip(*found, strict=True)
        ]


class _OpenVocabularyJudge(DetectorJudge):
    """A detector that is given the names of the classes, and finds boxes without masks."""

    batch = len(CLASS_NAMES)  # names that it is given at once

    def __init__(self, source: str, device: torch.device | str, *, clip: str = CLIP, threshold: float = 0.3):
        """threshold: scores below it are no detections; GenEval's own 0.3 and 0.9 are applied after it."""
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(source)
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(source).to(device).eval()
        except (OSError, ValueError) as error:
            raise EvaluationError(f"the judge {source} cannot be loaded: {error}") from error
        self.device, self.threshold = device, threshold
        self.colors = load_clip(clip, device)
        self.name = f"{type(self).__name__.removesuffix('Judge').lower()}:{source}+{Path(clip).name}"

    @torch.no_grad()
    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        found: list[tuple[str, list[float], float, np.ndarray | None]] = []
        image = Image.fromarray(pixels)
        for start in range(0, len(CLASS_NAMES), self.batch):
            names = CLASS_NAMES[start : start + self.batch]
            inputs = self.processor(images=image, text=self.texts(names), return_tensors="pt").to(self.device)
            result = self.boxes(self.model(**inputs), inputs, pixels.shape[:2])
            for label, score, box in zip(self.labels(result, names), result["scores"], result["boxes"], strict=True):
                if label is not None:
                    found.append((label, [float(side) for side in box], float(score), None))
        return found

    def texts(self, names: Sequence[str]) -> Any:
        return [[f"a photo of a {name}" for name in names]]

    def boxes(self, outputs: Any, inputs: Any, size: tuple[int, ...]) -> Mapping[str, Any]:
        raise NotImplementedError

    def labels(self, result: Mapping[str, Any], names: Sequence[str]) -> list[str | None]:
        return [names[int(label)] for label in result["labels"]]


class Owlv2Judge(_OpenVocabularyJudge):
    """OWLv2, such as google/owlv2-base-patch16-ensemble: approximate."""

    def boxes(self, outputs: Any, inputs: Any, size: tuple[int, ...]) -> Mapping[str, Any]:
        sizes = [tuple(size)]
        return self.processor.post_process_grounded_object_detection(
            outputs=outputs, target_sizes=sizes, threshold=self.threshold
        )[0]


class GroundingDinoJudge(_OpenVocabularyJudge):
    """Grounding DINO, such as openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg: approximate.

    It is asked about 20 classes at a time, as its texts hold 256 tokens.
    """

    batch = 20

    def texts(self, names: Sequence[str]) -> Any:
        return [list(names)]

    def boxes(self, outputs: Any, inputs: Any, size: tuple[int, ...]) -> Mapping[str, Any]:
        return self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=self.threshold, target_sizes=[tuple(size)]
        )[0]

    def labels(self, result: Mapping[str, Any], names: Sequence[str]) -> list[str | None]:
        """Match the words that were found with the names; words of no single class are left out."""
        words = result.get("text_labels", result["labels"])
        return [label if label in names else None for label in words]
