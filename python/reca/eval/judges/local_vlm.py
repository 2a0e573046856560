"""A vision-language model in transformers, with greedy decoding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from reca.data.pixels import open_rgb
from reca.eval.errors import EvaluationError
from reca.eval.judges.base import ImageOrFile, Judge, without_thoughts


class LocalVlmJudge(Judge):
    """A local vision-language model, prompted with its own chat template."""

    def __init__(self, source: str, device: torch.device | str, *, dtype: str = "bfloat16", max_new_tokens: int = 1024):
        """Load the model. source: hub id or folder. dtype: bfloat16, float16 or float32."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(source)
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"the judge {source} cannot be loaded: {error}") from error
        self.model = model.to(device).eval()
        self.device, self.dtype, self.max_new_tokens = device, dtype, max_new_tokens
        self.options = {"max_new_tokens": max_new_tokens}
        self.name = f"local:{source}"

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        if (dtype := options.get("dtype", "bfloat16")) not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"judge option dtype={dtype}: expected bfloat16, float16 or float32")

    def reply(self, text: str, images: Sequence[ImageOrFile]) -> str:
        inputs = self._inputs(text, images)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return without_thoughts(self.processor.batch_decode(new, skip_special_tokens=True)[0])

    def first_token_probability(self, text: str, images: Sequence[ImageOrFile], accepted: Sequence[str]) -> float:
        inputs = self._inputs(text, images)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
        probabilities = logits.float().softmax(-1)
        tokenizer = self.processor.tokenizer
        first = [tokenizer.encode(string, add_special_tokens=False)[0] for string in accepted]
        return float(sum(float(probabilities[token]) for token in first))

    def _inputs(self, text: str, images: Sequence[ImageOrFile]) -> Any:
        content: list[dict[str, Any]] = [{"type": "image", "image": _rgb(image)} for image in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return inputs.to(self.device, self.model.dtype)


def _rgb(image: ImageOrFile) -> Image.Image:
    return open_rgb(image.read_bytes()) if isinstance(image, Path) else image
