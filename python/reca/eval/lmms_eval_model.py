"""The model class of lmms-eval: its hundred understanding suites run on a run or a recipe.

    pip install lmms-eval
    python -m lmms_eval --model reca --model_args source=runs/show_o_512 --tasks mme,pope --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` of this package. Nothing else here imports lmms-eval.
"""

from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

import reca

MOST_NEW_TOKENS = 128  # where a task names no number


class Reca(lmms):
    """Answers questions about one picture, greedily."""

    is_simple = True

    def __init__(
        self, source: str, batch_size: int | str = 1, device: str | None = None, ema: bool = False, **overrides: Any
    ):
        """source: the folder of a run, or a recipe. overrides: recipe keys, such as model.weights=/data/show-o."""
        super().__init__()
        self.model = reca.load(source, overrides, device, ema)
        if "answer" not in self.model.abilities:
            raise ValueError(f"{source} is a model that cannot answer questions about images")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1

    def generate_until(self, requests: list) -> list[str]:
        """Answer all requests. Those that ask for as many new tokens share batches."""
        answers = [""] * len(requests)
        groups: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            tokens = (request.args[1] or {}).get("max_new_tokens", MOST_NEW_TOKENS)
            groups.setdefault(int(tokens), []).append(place)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="reca")
        for tokens, places in groups.items():
            for start in range(0, len(places), self.batch_size):
                chunk = places[start : start + self.batch_size]
                asked = [self._question(requests[place]) for place in chunk]
                pictures, questions = [picture for picture, _ in asked], [question for _, question in asked]
                for place, answer in zip(chunk, self.model.answer(pictures, questions, tokens), strict=True):
                    answers[place] = _until(answer, (requests[place].args[1] or {}).get("until"))
                bar.update(len(chunk))
        bar.close()
        return answers

    def _question(self, request: Any) -> tuple[torch.Tensor, str]:
        """Return the picture, uint8 [3, H, W], and the question of a request. Raises ValueError without one picture."""
        text, _, doc_to_visual, number, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][number]) or []
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
            raise ValueError(
                f"{task}, document {number}: it shows {len(pictures)} pictures or a video, and this model answers "
                "about one picture; choose tasks of single images"
            )
        pixels = np.array(pictures[0].convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), text.replace("<image>", "").strip()

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        raise NotImplementedError("this model answers in words; choose tasks of the kind generate_until")

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("this model answers one question at a time; choose tasks of a single round")


def _until(answer: str, stops: str | list[str] | None) -> str:
    """Cut an answer at the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer


def manifest() -> Any:
    """Tell lmms-eval's registry the name of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("reca", simple_class_path=f"{__name__}.Reca")
