"""Judges of GenEval: its own detector, and two approximate ones from transformers. All need weight files."""

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
from reca.eval.suites.geneval_rules import CLASS_NAMES, kept_places

RECORDED_SCORE = 0.05  # minimum score of a recorded detection, below all thresholds in use


class DetectorJudge(Judge):
    """Detects objects of GenEval's 80 classes, and classifies the colours of those for which a prompt asks it."""

    dtype = "float32"
    colors: ColorClassifier

    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        """Return (class, box, score, mask or None) of each object. pixels: uint8 [H, W, 3] RGB."""
        raise NotImplementedError

    def detect(self, image: Path, colored: Mapping[str, int], threshold: float) -> dict[str, list[dict[str, Any]]]:
        pixels = mask2former.read_rgb(image)
        found: dict[str, list[dict[str, Any]]] = {}
        masks: dict[str, list[np.ndarray | None]] = {}
        for name, box, score, mask in self.find(pixels):
            if score >= RECORDED_SCORE:
                found.setdefault(name, []).append({"box": box, "score": score})
                masks.setdefault(name, []).append(mask)
        whole = Image.fromarray(pixels)
        for name, count in colored.items():
            boxes = found.get(name, [])
            places = kept_places([box["score"] for box in boxes], threshold)[:count]
            colors = self.colors(whole, name, [boxes[i]["box"] for i in places], [masks[name][i] for i in places])
            for place, color in zip(places, colors, strict=True):
                boxes[place]["color"] = color
        return found


class Mask2FormerJudge(DetectorJudge):
    """GenEval's detector: OpenMMLab's Mask2Former swin-s, with CLIP ViT-L/14 for colours, in float32.

    For the published numbers CLIP ran on CUDA in half precision, so colours with nearly equal logits can differ.
    """

    exact = True
    version = "mmdet 2.28.2 in transformers, 1"

    def __init__(self, source: str, device: torch.device | str, *, clip: str = CLIP):
        path = Path(source)
        model = mask2former.build(mask2former.load_checkpoint(path), mask2former.configuration())
        self.detector = mask2former.Detector(model, device)
        self.colors = load_clip(clip, device)
        self.name = f"mask2former:{path.name}+{Path(clip).name}"

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        mask2former.check_checkpoint(Path(argument))

    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        found = self.detector(pixels)
        return [
            (CLASS_NAMES[int(label)], box.tolist(), float(score), mask.numpy())
            for label, score, box, mask in zip(*found, strict=True)
        ]


class _OpenVocabularyJudge(DetectorJudge):
    """An open-vocabulary detector. Its input includes the names of the classes; it returns boxes without masks."""

    batch = len(CLASS_NAMES)  # class names per forward pass

    def __init__(self, source: str, device: torch.device | str, *, clip: str = CLIP, threshold: float = 0.3):
        """Load the detector. threshold: minimum score of a detection; GenEval applies its own 0.3 or 0.9 afterwards."""
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(source)
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(source).to(device).eval()
        except (OSError, ValueError) as error:
            raise EvaluationError(f"the judge {source} cannot be loaded: {error}") from error
        self.device, self.threshold, self.options = device, threshold, {"threshold": threshold}
        self.colors = load_clip(clip, device)
        self.name = f"{type(self).__name__.removesuffix('Judge').lower()}:{source}+{Path(clip).name}"

    @torch.no_grad()
    def find(self, pixels: np.ndarray) -> list[tuple[str, list[float], float, np.ndarray | None]]:
        found: list[tuple[str, list[float], float, np.ndarray | None]] = []
        image, (height, width) = Image.fromarray(pixels), pixels.shape[:2]
        for start in range(0, len(CLASS_NAMES), self.batch):
            names = CLASS_NAMES[start : start + self.batch]
            inputs = self.processor(images=image, text=self.texts(names), return_tensors="pt").to(self.device)
            outputs = self.model(**inputs)
            scores, labels = self.scores(outputs.logits[0].float().sigmoid(), inputs["input_ids"]).max(-1)
            middle, half = outputs.pred_boxes[0].float().split(2, -1)  # relative to the image, or its padded square
            corners = torch.cat([middle - half / 2, middle + half / 2], -1)
            corners = corners * torch.tensor([*self.sides(width, height) * 2], device=corners.device)
            for box, score, label in zip(corners.tolist(), scores.tolist(), labels.tolist(), strict=True):
                if score > self.threshold:
                    found.append((names[label], box, score, None))
        return found

    def texts(self, names: Sequence[str]) -> Any:
        """Format class names for the processor."""
        raise NotImplementedError

    def scores(self, probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Convert the model's probabilities, [boxes, columns], to scores per name, [boxes, names]."""
        return probabilities

    def sides(self, width: int, height: int) -> tuple[float, float]:
        """Return the width and height in pixels that relative box coordinates refer to."""
        return float(width), float(height)


class Owlv2Judge(_OpenVocabularyJudge):
    """OWLv2, such as google/owlv2-base-patch16-ensemble: approximate. It pads images to squares."""

    def texts(self, names: Sequence[str]) -> Any:
        return [[f"a photo of a {name}" for name in names]]

    def sides(self, width: int, height: int) -> tuple[float, float]:
        return float(max(width, height)), float(max(width, height))


class GroundingDinoJudge(_OpenVocabularyJudge):
    """Grounding DINO, such as openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg: approximate.

    It gets 20 classes per forward pass, since its text length is limited to 256 tokens. A class's score is the mean
    over its tokens.
    """

    batch = 20

    def texts(self, names: Sequence[str]) -> Any:
        return " ".join(f"{name}." for name in names)

    def scores(self, probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        dot = self.processor.tokenizer.convert_tokens_to_ids(".")
        special = set(self.processor.tokenizer.all_special_ids)
        spans: list[list[int]] = [[]]
        for place, token in enumerate(tokens[0].tolist()):
            if token == dot:
                spans.append([])
            elif token not in special:
                spans[-1].append(place)
        return torch.stack([probabilities[:, span].mean(-1) for span in spans if span], -1)
