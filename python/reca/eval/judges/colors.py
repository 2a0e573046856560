"""GenEval's colour classifier: zero-shot classification of an object's crop by CLIP, in transformers.

Source: djghosh13/geneval, evaluate_images.py (ImageCrops, color_classification), and clip_benchmark 1.6.2.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.eval.errors import EvaluationError
from reca.eval.suites.geneval_rules import COLORS
from reca.options.names import option

BACKGROUND = "#999"
CLIP = "openai/clip-vit-large-patch14"
SIDE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LOGIT_SCALE = 100.0


def crop(image: Image.Image, box: Sequence[float], mask: np.ndarray | None) -> Image.Image:
    """Crop an image to a box. Pixels outside the mask, bool [H, W], are grey; those outside the image are black."""
    image = image.convert("RGB")
    if mask is not None:
        empty = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, empty, Image.fromarray(mask.astype(np.uint8) * 255, "L"))
    return image.crop(tuple(round(float(side)) for side in box))  # type: ignore[arg-type]


def texts(class_name: str) -> list[str]:
    """Return the 30 prompts of a class, three per colour."""
    forms = (f"a photo of a {{}} {class_name}", f"a photo of a {{}}-colored {class_name}", "a photo of a {} object")
    return [form.format(color) for color in COLORS for form in forms]


def classifier(text_embeddings: Tensor) -> Tensor:
    """Average the normalised embeddings [30, D] of each colour's prompts and normalise again. Return [D, 10]."""
    grouped = _unit(text_embeddings).unflatten(0, (len(COLORS), -1))
    return _unit(grouped.mean(1)).T


def classify(image_embeddings: Tensor, columns: Tensor) -> tuple[Tensor, list[str]]:
    """Return logits [N, 10] and the colour of each image embedding [N, D]. Ties go to the first colour of COLORS."""
    logits = LOGIT_SCALE * _unit(image_embeddings) @ columns
    return logits, [COLORS[int(np.argmax(row))] for row in logits.cpu().numpy()]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def clip_pixels(image: Image.Image) -> Tensor:
    """Prepare an image as open_clip does for ViT-L/14: float32 [3, 224, 224]."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(SIDE * long / short)
    size = (SIDE, other) if width <= height else (other, SIDE)
    image = image.resize(size, Image.Resampling.BICUBIC).convert("RGB")
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    return ((torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


class ColorClassifier:
    """Classifies the colours of objects. The prompts of a class are embedded once."""

    def __init__(self, embed_texts: Callable[[list[str]], Tensor], embed_images: Callable[[Tensor], Tensor]):
        self.embed_texts, self.embed_images = embed_texts, embed_images
        self.columns: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, class_name: str, boxes: Sequence[Sequence[float]], masks: Sequence[Any]
    ) -> list[str]:
        if not len(boxes):
            return []
        if class_name not in self.columns:
            self.columns[class_name] = classifier(self.embed_texts(texts(class_name)))
        crops = [crop(image, box, mask) for box, mask in zip(boxes, masks, strict=True)]
        pixels = torch.stack([clip_pixels(part) for part in crops])
        return classify(self.embed_images(pixels), self.columns[class_name])[1]


def load_clip(source: str, device: torch.device | str) -> ColorClassifier:
    """Load CLIP ViT-L/14 (OpenAI's weights, which use QuickGELU) from the hub or a folder, in float32.

    Raises EvaluationError if it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPTokenizerFast

    place = os.path.expanduser(source)
    try:
        model = CLIPModel.from_pretrained(place, torch_dtype=torch.float32).to(device).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the judge's CLIP, {source}, cannot be loaded: {error}. Set its folder by "
            f"{option('judge_options', {'clip': 'FOLDER'})}"
        ) from error

    def embed_texts(lines: list[str]) -> Tensor:
        tokens = tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = model.text_model(**tokens)
        return model.text_projection(hidden.pooler_output)

    def embed_images(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels.to(device)).pooler_output)

    return ColorClassifier(embed_texts, embed_images)
