"""A vision-language model behind an OpenAI-compatible endpoint, such as vLLM, SGLang or a hosted one."""

import http.client
import io
import json
import logging
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reca.data.pixels import open_rgb
from reca.eval.errors import EvaluationError, OptionError
from reca.eval.judges.base import ImageOrFile, Judge, JudgeError, without_thoughts
from reca.io import html
from reca.io.files import parse_json
from reca.options.names import option

log = logging.getLogger("reca")

KEY = "RECA_JUDGE_KEY"
AGAIN = (408, 409, 425, 429)  # status codes to retry, as are all from 500
OF_ONE = (400, 413, 422)  # status codes that can concern one image or prompt only, such as those of content filters
# What to do about some status codes.
_NO_KEY = f"; the key is read from {KEY}"
_NO_PATH = "; check the judge's model, and its URL, to which /chat/completions is appended: most end in /v1"
HINTS = {401: _NO_KEY, 403: _NO_KEY, 404: _NO_PATH, 405: _NO_PATH}
# Parameters that some models reject, such as OpenAI's since o1, and their replacements; None: omit.
IN_PLACE = {"max_tokens": "max_completion_tokens", "temperature": None}
REFUSED = re.compile(r"'(max_tokens|temperature)' (is not supported|does not support)")
LONGEST_WAIT = 60.0  # maximum seconds between two attempts
SHOWN = 300  # maximum characters of a server's reply in a message
MIMES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}


class EndpointJudge(Judge):
    """A judge queried by chat completions. The API key is read from the environment and never written or logged."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        workers: int = 8,
        requests_per_minute: float | None = None,
        max_tokens: int = 1024,
        price_in: float | None = None,
        price_out: float | None = None,
        dtype: str | None = None,
    ):
        """Connect to an endpoint.

        url: base URL, up to /v1. model: model name; None: the only one served. timeout: seconds per request. workers:
        concurrent requests. price_in, price_out: dollars per million tokens. dtype: that of the served model, for the
        records.
        Raises EvaluationError if `model` is None and the endpoint does not answer or serves several models.
        """
        self.key = os.environ.get(KEY, "")
        self.url, self.tries, self.workers, self.max_tokens = url.rstrip("/"), int(tries), int(workers), max_tokens
        self.timeout, self.options = timeout, {"url": self.url, "max_tokens": max_tokens}
        self.pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self.prices, self.dtype = (price_in, price_out), dtype
        self.lock, self.next_start = threading.Lock(), 0.0
        self.requests, self.tokens = 0, [0, 0]
        self.refused: set[str] = set()  # parameters of IN_PLACE
        self.model = model or self._only_model()
        self.name = f"endpoint:{self.model}"

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        parts = urlsplit(argument)
        whole = parts.path.rstrip("/").endswith(("/completions", "/models"))  # instead of what these are appended to
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query or whole:
            raise ValueError(
                f"{option('judge', 'endpoint')}: expected a URL such as http://localhost:8000/v1, to which "
                f"/chat/completions is appended, without a key in it; the key is read from {KEY}"
            )

    def reply(self, text: str, images: Sequence[ImageOrFile]) -> str:
        choice = self._complete(text, images, max_tokens=self.max_tokens)
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not (answer := without_thoughts(content)).strip():
            raise JudgeError(f"the judge's answer is empty (finish_reason {choice.get('finish_reason')!r})")
        return answer

    def first_token_probability(self, text: str, images: Sequence[ImageOrFile], accepted: Sequence[str]) -> float:
        """See Judge. The first token of a string is taken to be the longest returned token that is a prefix of it."""
        choice = self._complete(text, images, max_tokens=1, logprobs=True, top_logprobs=20)
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if not content:
            raise EvaluationError(
                f"the endpoint returned no logprobs for {self.model}, which this suite needs; enable them on the "
                "server (vLLM: --max-logprobs 20)"
            )
        try:
            top = {entry["token"]: math.exp(entry["logprob"]) for entry in content[0].get("top_logprobs") or content}
            if not all(isinstance(token, str) and 0 <= p <= 1.001 for token, p in top.items()):
                raise ValueError("a token is not a string, or a probability is outside [0, 1]")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise JudgeError(
                f"the endpoint's logprobs cannot be read ({error!r}): {self._short(str(content))}"
            ) from error
        total = 0.0
        for string in accepted:
            begins = [token for token in top if token and string.startswith(token)]
            total += top[max(begins, key=len)] if begins else 0.0
        return total

    def cost(self) -> str | None:
        if not self.requests:
            return None
        line = f"judge {self.model}: {self.requests} requests, {self.tokens[0]} tokens in, {self.tokens[1]} out"
        if None not in self.prices:
            dollars = (
                sum(count * float(price or 0) for count, price in zip(self.tokens, self.prices, strict=True)) / 1e6
            )
            line += f", ${dollars:.2f}"
        return line

    def _only_model(self) -> str:
        listed = self._request("GET", "models").get("data")
        names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if len(names) != 1 or not names[0]:
            shown = ", ".join(map(str, names[:10])) or "none"
            raise OptionError(
                f"{self.url} serves these models: {shown}; select one by {option('judge_options', {'model': 'NAME'})}"
            )
        return names[0]

    def _complete(self, text: str, images: Sequence[ImageOrFile], **options: Any) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": text})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0} | options
        found = self._request("POST", "chat/completions", body)
        try:
            usage, choice = found.get("usage") or {}, found["choices"][0]
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(choice, dict):
                raise TypeError(choice)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise JudgeError(f"the endpoint returned no chat completion: {self._short(str(found))}") from error
        with self.lock:
            self.requests += 1
            self.tokens = [a + b for a, b in zip(self.tokens, counts, strict=True)]
        return choice

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, with retries, and return the JSON object of the response.

        Raises JudgeError after the last attempt or if this request is rejected, and EvaluationError if others will fail
        in the same way.
        """
        reason = ""
        for number in range(self.tries):
            self._wait_for_turn()
            wait = min(2.0**number, LONGEST_WAIT)
            refused = set(self.refused)
            try:
                found = parse_json(self._send(method, path, body and _without(refused, body)))
                if isinstance(found, dict):
                    return found
                reason = f"not a JSON object: {found}"
            except urllib.error.HTTPError as refusal:
                said = refusal.read(SHOWN * 10).decode(errors="replace")
                if (about := REFUSED.search(said)) and about[1] not in refused:
                    self._note_refusal(about[1])
                    return self._request(method, path, body)
                if refusal.code not in AGAIN and refusal.code < 500:
                    hint = HINTS.get(refusal.code, "")
                    kind = JudgeError if method == "POST" and refusal.code in OF_ONE else EvaluationError
                    raise kind(
                        f"{self.url} rejected the request with HTTP {refusal.code}: {self._short(said)}{hint}"
                    ) from None
                reason, wait = f"HTTP {refusal.code}: {said}", _retry_after(refusal.headers, wait)
            except (OSError, http.client.HTTPException) as failure:  # URLError and TimeoutError are OSErrors
                cause = getattr(failure, "reason", failure)
                late = isinstance(cause, TimeoutError)
                reason = f"no answer within {self.timeout:g} s" if late else f"{type(cause).__name__}: {cause}"
            except ValueError as failure:
                reason = f"invalid JSON: {failure}"
            if number + 1 < self.tries:
                time.sleep(wait * random.uniform(0.8, 1.2))
        kind = JudgeError if method == "POST" else EvaluationError
        raise kind(f"{self.url} failed {self.tries} times; the last error: {self._short(reason)}")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # not sent to a redirect's host
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()

    def _note_refusal(self, name: str) -> None:
        with self.lock:
            if name == "temperature" and name not in self.refused:
                log.warning("%s rejects temperature 0: its answers are sampled and not reproducible", self.model)
            self.refused.add(name)

    def _wait_for_turn(self) -> None:
        """Sleep as needed to respect requests_per_minute."""
        if not self.pause:
            return
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + self.pause
        time.sleep(max(0.0, start - time.monotonic()))

    def _short(self, text: str) -> str:
        """Truncate a server's reply and remove the key from it."""
        clean = text.replace(self.key, "[key]") if self.key else text
        return " ".join(clean.split())[:SHOWN]


def _without(refused: Collection[str], body: dict[str, Any]) -> dict[str, Any]:
    """Return a request body in which rejected parameters are replaced or omitted, see IN_PLACE."""
    names = {name: IN_PLACE[name] if name in refused else name for name in body}
    return {new: body[name] for name, new in names.items() if new is not None}


def _retry_after(headers: Message, usual: float) -> float:
    """Return the seconds of the Retry-After header, at most LONGEST_WAIT; `usual` without a valid one."""
    try:
        return min(max(float(headers.get("retry-after", usual)), 0.0), LONGEST_WAIT)
    except ValueError:
        return usual


def data_url(image: ImageOrFile) -> str:
    """Encode an image as a data URL. Files in a common format are not re-encoded."""
    if isinstance(image, Path):
        data = image.read_bytes()
        mime = next((name for magic, name in MIMES.items() if data.startswith(magic)), None)
        if mime is not None:
            return html.data_url(data, mime)
        image = open_rgb(data)  # a format that few servers support, such as TIFF
    file = io.BytesIO()
    image.save(file, "PNG")
    return html.data_url(file.getvalue(), "png")
