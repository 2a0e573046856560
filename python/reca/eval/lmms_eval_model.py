"""The model class of lmms-eval: its hundred understanding suites run on a run or a recipe.

    pip install lmms-eval 'filelock<4'
    python -m lmms_eval --model reca --model_args source=runs/show_o_512 --tasks mme,pope --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` of this package. Nothing else here imports lmms-eval. It is a
"simple" model in its terms: chat models cannot choose among given answers there.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import reca
from reca import inference
from reca.data.errors import BadSample
from reca.data.pixels import as_rgb, pixels_of, read_image

log = logging.getLogger("reca")
NEW_TOKENS = 128  # of an answer, where a task names no number


class Reca(lmms):
    """Answers questions about one image, greedily, and tells how likely it finds given answers.

    Under torchrun or accelerate every rank has the whole model, and its share of the questions.
    """

    is_simple = True

    def __init__(
        self,
        source: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        ema: bool = False,
        max_new_tokens: int | None = None,
        **overrides: Any,
    ):
        """Load the model.

        source: the folder of a run, or a recipe. overrides: recipe keys, such as model.weights=/data/show-o.
        max_new_tokens: the most of an answer, whatever a task asks for.
        """
        self.model_name = f"reca:{source}"
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device) if device else _own_device()
        self.model = reca.load(source, overrides, self.device, ema)
        if "answer" not in self.model.abilities:
            raise ValueError(f"{source} is a model that cannot answer questions about images")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else max_batch_size or 1
        self.max_new_tokens, self.greedy_said = max_new_tokens, False

    def generate_until(self, requests: list) -> list[str]:
        """Answer all requests. Those that ask for as many new tokens share batches."""
        answers = [""] * len(requests)
        groups: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._new_tokens(request.args[1] or {}), []).append(place)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="reca") as bar:
            for tokens, places in groups.items():
                for start in range(0, len(places), self.batch_size):
                    chunk = places[start : start + self.batch_size]
                    replies = self._answer([self._question(requests[place]) for place in chunk], tokens)
                    for place, reply in zip(chunk, replies, strict=True):
                        answers[place] = _until(reply, (requests[place].args[1] or {}).get("until"))
                    bar.update(len(chunk))
        return answers

    def loglikelihood(self, requests: list) -> list[GenerationResult]:
        """Return the loss of each given answer, -log p per token, and whether greedy decoding gives that answer.

        The loss, since lmms-eval takes the choice with the least number for the model's. It is inf for an answer of
        which the model reads nothing, behind a question that is too long. Release 0.7.3 turns a bare pair into a
        string, of any model, and then fails on it; what is wrapped passes as it is.
        """
        found, replies = [], dict[Any, tuple[str, int]]()
        for request in tqdm(requests, disable=self.rank != 0, desc="reca"):
            if len(request.args) != 6:
                raise ValueError(
                    "a task asks how likely an answer is without a question and an image (acc_mutual_info); this model "
                    "answers about an image: leave that metric out"
                )
            text, given, _, number, task, split = request.args
            given = (given if isinstance(given, str) else str(given(self.task_dict[task][split][number]))).strip()
            asked = self._question(request)
            (likely,) = self.model.log_likelihood([asked[0]], [asked[1]], [given])
            key = task, split, number, text
            reply, length = replies.get(key, ("", 0))
            if length < likely.tokens:
                reply, length = self._answer([asked], likely.tokens)[0], likely.tokens
                replies = {key: (reply, length)}  # the choices of a document come one after another
            found.append(GenerationResult((-likely.mean, likely.tokens > 0 and reply == given)))
        return found

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("this model answers one question at a time; choose tasks of a single round")

    def _answer(self, asked: list[tuple[Tensor, str]], tokens: int) -> list[str]:
        images, questions = [image for image, _ in asked], [question for _, question in asked]
        return inference.answer(self.model, images, questions, max_new_tokens=tokens)

    def _new_tokens(self, options: dict[str, Any]) -> int:
        """Return how many tokens a task asks for. Say once that answers are greedy where it asks for others."""
        sampled = (
            options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1
        )
        if sampled and not self.greedy_said:
            self.greedy_said = True
            log.warning("a task asks for sampled answers or beams (%s); this model answers greedily", options)
        asked = int(options.get("max_new_tokens") or NEW_TOKENS)
        return asked if self.max_new_tokens is None else min(asked, self.max_new_tokens)

    def _question(self, request: Any) -> tuple[Tensor, str]:
        """Return the image, uint8 [3, H, W], and the question of a request. Raises ValueError without one image."""
        text, _, doc_to_visual, number, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][number]) or []
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image | str | Path):
            raise ValueError(
                f"{task}, document {number}: it shows {len(visuals)} images or a video, and this model answers about "
                "one image; choose tasks of single images"
            )
        return _pixels(visuals[0], f"{task}, document {number}"), text.replace("<image>", "").strip()


def _pixels(visual: Image.Image | str | Path, where: str) -> Tensor:
    """Read an image as training does, uint8 [3, H, W]. Raises ValueError for one that cannot be read."""
    if not isinstance(visual, Image.Image):
        return read_image(Path(visual))
    try:
        return pixels_of(as_rgb(visual)).contiguous()
    except BadSample as error:
        raise ValueError(f"{where}: {error}") from error


def _own_device() -> torch.device:
    """Return the device of this process: its own GPU, if there are some."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def _until(answer: str, stops: str | list[str] | None) -> str:
    """Cut an answer at the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer


def manifest() -> Any:
    """Tell lmms-eval's registry the name of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("reca", simple_class_path=f"{__name__}.Reca")
