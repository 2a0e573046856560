"""Model class for lmms-eval, which evaluates a run or a recipe on its understanding suites.

    pip install lmms-eval 'filelock<4'
    python -m lmms_eval --model reca --model_args source=runs/show_o_512 --tasks mme,pope --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` of this package. Nothing else here imports lmms-eval. It is a
"simple" model in lmms-eval's terms, since its chat models do not support multiple choice by likelihood.
"""

import itertools
import logging
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
from reca.hardware.devices import usable_device
from reca.launcher import number

log = logging.getLogger("reca")
NEW_TOKENS = 128  # maximum tokens of an answer if a task sets none


class Reca(lmms):
    """Answers questions about one image by greedy decoding, and computes the likelihood of given answers.

    Under torchrun or accelerate each rank has the whole model and a share of the questions.
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

        source: run folder or recipe. overrides: recipe keys, such as model.weights=/data/show-o.
        max_new_tokens: upper limit of an answer's tokens for all tasks.
        """
        self.model_name = f"reca:{source}"
        super().__init__()
        self._rank, self._world_size = number("RANK", 0), number("WORLD_SIZE", 1)
        self.device = usable_device(device) if device else _own_device()
        self.model = reca.load(source, overrides, self.device, ema)
        if "answer" not in self.model.abilities:
            raise ValueError(f"{source} cannot answer questions about images; use a model with the ability answer")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else max_batch_size or 1
        self.max_new_tokens, self.greedy_said = max_new_tokens, False

    def generate_until(self, requests: list) -> list[str]:
        """Answer all requests. Requests with the same number of new tokens are batched together."""
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
        """Return the loss of each given answer, -log p per token, and whether greedy decoding produces that answer.

        lmms-eval selects the choice with the smallest value, hence the loss. It is inf if the question is so long that
        the whole answer is truncated. Results are GenerationResult because release 0.7.3 converts plain tuples to
        strings, and then fails.
        """
        found = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="reca") as bar:
            for _, choices in itertools.groupby(requests, _asked):  # the choices of a document are consecutive
                found += self._choices(list(choices))
                bar.update(len(found) - bar.n)
        return found

    def _choices(self, requests: list) -> list[GenerationResult]:
        """Return the results of requests with the same image and question."""
        image, question = self._question(requests[0])
        answers = [self._given(request) for request in requests]
        likely = self.model.log_likelihood([image] * len(answers), [question] * len(answers), answers)
        longest = max(one.tokens for one in likely)
        reply = self._answer([(image, question)], longest)[0] if longest else ""
        return [
            GenerationResult((-one.mean, one.tokens > 0 and reply == given))
            for one, given in zip(likely, answers, strict=True)
        ]

    def _given(self, request: Any) -> str:
        """Return the answer that a request names."""
        _, given, _, number, task, split = request.args
        return (given if isinstance(given, str) else str(given(self.task_dict[task][split][number]))).strip()

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("this model answers one question at a time; choose tasks of a single round")

    def _answer(self, asked: list[tuple[Tensor, str]], tokens: int) -> list[str]:
        images, questions = [image for image, _ in asked], [question for _, question in asked]
        return inference.answer(self.model, images, questions, max_new_tokens=tokens)

    def _new_tokens(self, options: dict[str, Any]) -> int:
        """Return the number of new tokens of a task. Warn once if it asks for sampling or beams."""
        sampled = (
            options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1
        )
        if sampled and not self.greedy_said:
            self.greedy_said = True
            log.warning("a task asks for sampling or beam search (%s); this model decodes greedily", options)
        asked = int(options.get("max_new_tokens") or NEW_TOKENS)
        return asked if self.max_new_tokens is None else min(asked, self.max_new_tokens)

    def _question(self, request: Any) -> tuple[Tensor, str]:
        """Return the image, uint8 [3, H, W], and the question. Raises ValueError unless there is exactly one image."""
        text, _, doc_to_visual, number, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][number]) or []
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image | str | Path):
            raise ValueError(
                f"{task}, document {number} has {len(visuals)} images or a video, but this model supports one image; "
                "choose single-image tasks"
            )
        return _pixels(visuals[0], f"{task}, document {number}"), text.replace("<image>", "").strip()


def _asked(request: Any) -> tuple[Any, ...]:
    """Return what is equal in the requests of all choices of a document. Raises ValueError without an image."""
    if len(request.args) != 6:
        raise ValueError(
            "a task needs the likelihood of an answer without question and image (acc_mutual_info), but this model "
            "needs an image; omit that metric"
        )
    text, _, _, number, task, split = request.args
    return text, number, task, split


def _pixels(visual: Image.Image | str | Path, where: str) -> Tensor:
    """Read an image as training does, uint8 [3, H, W]. Raises ValueError if it cannot be read."""
    if not isinstance(visual, Image.Image):
        return read_image(Path(visual))
    try:
        return pixels_of(as_rgb(visual)).contiguous()
    except BadSample as error:
        raise ValueError(f"{where}: {error}") from error


def _own_device() -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the CPU without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", number("LOCAL_RANK", 0) % torch.cuda.device_count())


def _until(answer: str, stops: str | list[str] | None) -> str:
    """Truncate an answer at the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer


def manifest() -> Any:
    """Return the entry of this model in lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("reca", simple_class_path=f"{__name__}.Reca")
