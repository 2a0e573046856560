"""`reca serve`: a web page to generate, edit and answer with a model, optionally side by side with a second one."""

import contextlib
import functools
import html
import logging
import math
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reca import inference
from reca.data.pixels import read_image
from reca.eval.targets import Target, opponent, target
from reca.hardware.devices import usable_device
from reca.io.image_grid import enlarged, to_pil
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.inference import check_pairs, warn_of_unknown_words
from reca.options.fields import RecipeError
from reca.options.sampling import check_sampling_options, defaults, read_pairs

log = logging.getLogger("reca")

OLDEST_GRADIO = (6, 27)  # as in pyproject.toml
OFFERED = frozenset({"generate", "edit", "answer"})  # abilities that have a tab
MAX_UPLOAD = 32 * 2**20  # bytes per image
MAX_TEXT = 4000  # characters of a prompt, an instruction or a question
MAX_WAITING = 16  # queued requests
MAX_TIMES = 10  # the sampling steps of a request, as a multiple of the defaults
MAX_SIDE = 2048  # pixels of the height and the width of a generated image
SMALLEST = 256  # minimum of the longer side of an image on the page, in pixels
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Local fonts only: the page loads nothing from other servers.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass(frozen=True)
class Side:
    """A model of the page."""

    label: str
    model: Adapter


class Requests:
    """Requests of the page: each method returns one result per side, from equal seeds.

    The methods raise ValueError or OSError for an invalid request, and inference.MemoryFull.
    """

    def __init__(self, sides: Sequence[Side]):
        self.sides = list(sides)
        self.abilities = OFFERED.intersection(*(side.model.abilities for side in sides))

    def generate(self, prompt: str, seed: int, sampling: str = "") -> list[Image.Image]:
        _check_text(prompt, seed)
        options = [read_sampling(sampling, side.model.generate) for side in self.sides]
        return [
            to_pil(inference.generate(side.model, [prompt], [seed], **given)[0])
            for side, given in self._asked(prompt, options)
        ]

    def edit(self, path: str | None, instruction: str, seed: int, sampling: str = "") -> list[Image.Image]:
        _check_text(instruction, seed)
        options = [read_sampling(sampling, side.model.edit) for side in self.sides]
        image = read_upload(path)
        return [
            to_pil(inference.edit(side.model, [image], [instruction], [seed], **given)[0])
            for side, given in self._asked(instruction, options)
        ]

    def answer(self, path: str | None, question: str) -> list[str]:
        _check_text(question, 0)
        image = read_upload(path)
        return [
            inference.answer(side.model, [image], [question])[0]
            for side, _ in self._asked(question, [{}] * len(self.sides))
        ]

    def _asked(self, text: str, options: list[dict[str, Any]]) -> Iterator[tuple[Side, dict[str, Any]]]:
        for side, given in zip(self.sides, options, strict=True):
            warn_of_unknown_words(side.model.tokenizer, [text])
            yield side, given


def read_sampling(text: str | None, method: Callable) -> dict[str, Any]:
    """Parse key=value options of `method`, separated by blanks, commas, semicolons or lines.

    Raises ValueError, also for more work than one request may ask for, since all others wait for it.
    """
    text = (text or "").strip()
    parts = re.split(r"[\s,;]+(?=\w+\s*=)", text) if text else ()
    given = check_sampling_options(method, read_pairs((part.strip(" ,;") for part in parts), "sampling option"))
    _check_work(given, defaults(method))
    return given


def _check_work(given: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    for name in ("height", "width"):
        if (given.get(name) or 0) > MAX_SIDE:
            raise ValueError(f"sampling option {name}={given[name]}: the limit of this page is {MAX_SIDE} pixels")
    steps = [name for name in ("steps", "diffusion_steps") if name in given]
    if (times := math.prod(given[name] / usual[name] for name in steps)) > MAX_TIMES:
        asked, default = (" ".join(f"{name}={values[name]}" for name in steps) for values in (given, usual))
        raise ValueError(
            f"sampling options {asked} would take {times:.4g} times as long as the defaults ({default}); the limit of "
            f"this page is {MAX_TIMES} times"
        )


def read_upload(path: str | None) -> Tensor:
    """Decode an uploaded image like training data, with the same limits. Raises ValueError; DataError is one."""
    if path is None:
        raise ValueError("there is no image; choose a file first")
    if (size := Path(path).stat().st_size) > MAX_UPLOAD:
        raise ValueError(f"the image has {size} bytes; the limit is {MAX_UPLOAD}")
    try:
        return read_image(Path(path))
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error


def _check_text(text: str | None, seed: Any) -> None:
    if not text or not text.strip():
        raise ValueError("the text is empty; write a prompt, an instruction or a question")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text)} characters; the limit is {MAX_TEXT}")
    if not isinstance(seed, int):
        raise ValueError(f"seed {seed} is not an integer")
    check_pairs(seeds=[seed])


def open_sides(
    source: str | Path, overrides: Sequence[str], against: str | None, ema: bool, device: torch.device | str
) -> list[Side]:
    """Load the served model and, if `against` is set, the one to compare it with, which comes first.

    Raises RecipeError if `against` is not a model, or if no ability in OFFERED is common to both.
    """
    mine = target(source, overrides, "", None, ema)
    targets = [mine] if against is None else [opponent(against, mine, overrides, ""), mine]
    abilities = []
    for one in targets:
        if one.recipe is None:
            raise RecipeError(f"--against {against} is an evaluation folder; pass a run, a recipe or base")
        abilities.append(umm_package(one.recipe.umm).Adapter.abilities)
    if not OFFERED.intersection(*abilities):
        raise RecipeError(f"{source} and {against} have no ability in common; pass another model as --against")
    return [_side(one, one.load(device)) for one in targets]


def _side(one: Target, model: Adapter) -> Side:
    more = f", step {model.state['step']}{', EMA' if one.ema else ''}" if one.trained else ""
    return Side(f"{one.source}{more}", model)


def make_page(requests: Requests, title: str) -> Any:
    """Build the page, with a tab for each ability that all sides have. Return gradio's Blocks."""
    gradio = import_gradio()
    labels = [side.label for side in requests.sides]

    def text(label: str) -> Any:
        return gradio.Textbox(label=label, max_length=MAX_TEXT)

    def seed() -> Any:
        return gradio.Number(label="Seed", value=0, precision=0, minimum=0)

    def sampling() -> Any:
        return gradio.Textbox(label="Sampling options", placeholder="key=value; empty: the defaults")

    def upload() -> Any:
        return gradio.File(label="Image", type="filepath", file_count="single")

    def images() -> list:
        # No share button: it would upload the image to the Hugging Face hub.
        given = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"], "min_width": SMALLEST}
        return [gradio.Image(label=one, alt_text=f"by {one}", **given) for one in labels]

    def answers() -> list:
        return [gradio.Textbox(label=one, interactive=False, min_width=SMALLEST) for one in labels]

    tabs: dict[str, tuple[Callable, list[Callable], Callable]] = {
        "generate": (_enlarged(requests.generate), [lambda: text("Prompt"), seed, sampling], images),
        "edit": (_enlarged(requests.edit), [upload, lambda: text("Instruction"), seed, sampling], images),
        "answer": (requests.answer, [upload, lambda: text("Question")], answers),
    }
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(f"# {html.escape(title)}")
        for ability, (function, inputs, outputs) in tabs.items():
            if ability not in requests.abilities:
                continue
            with gradio.Tab(ability.capitalize()):
                given = [make() for make in inputs]
                button = gradio.Button(ability.capitalize(), variant="primary")
                with gradio.Row():
                    shown = outputs()
            button.click(
                _with_messages(function, gradio.Error), given, shown, api_name=ability,
                concurrency_limit=1, concurrency_id="models",
            )  # fmt: skip
    return page.queue(max_size=MAX_WAITING)


def _enlarged(function: Callable[..., list[Image.Image]]) -> Callable[..., list[Image.Image]]:
    """Upscale small images by an integer factor (nearest neighbour), because gradio shows images in their own size."""

    @functools.wraps(function)
    def wrapped(*given: Any) -> list[Image.Image]:
        return [enlarged(image, -(-SMALLEST // max(image.size))) for image in function(*given)]

    return wrapped


def _with_messages(function: Callable, message: Callable[..., Exception]) -> Callable:
    """Show errors of a request as messages on the page. Unexpected ones are also logged with their traceback."""

    @functools.wraps(function)
    def wrapped(*given: Any) -> Any:
        try:
            results = function(*given)
        except (ValueError, OSError, inference.MemoryFull) as error:
            escaped = html.escape(str(error), quote=False)  # gradio shows messages as HTML
            raise message(escaped, print_exception=False) from error
        except Exception as error:
            log.exception("a request of the page failed")
            raise message("the request failed; see the log of the server", print_exception=False) from error
        return results[0] if len(results) == 1 else results

    return wrapped


def import_gradio() -> Any:
    """Import gradio with telemetry disabled. Raises ValueError if it cannot be imported, or is too old."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"reca serve needs gradio, which cannot be imported ({error}): pip install 'reca[serve]'") \
            from error  # fmt: skip
    if tuple(map(int, gradio.__version__.split(".")[:2])) < OLDEST_GRADIO:
        oldest = ".".join(map(str, OLDEST_GRADIO))
        raise ValueError(
            f"reca serve needs gradio {oldest} or later, found {gradio.__version__}: pip install 'reca[serve]'"
        )
    return gradio


def check_address(host: str, port: int) -> None:
    """Raise ValueError if the address cannot be bound. Log a warning if it is not a loopback address."""
    if not 0 < port < 2**16:
        raise ValueError(f"--port must be between 1 and 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be used ({error.strerror}); set another --port or --host") from error
    if host not in LOOPBACK:
        log.warning("anyone who can reach %s:%d can use this model: the page has no password", host, port)


@contextlib.contextmanager
def served(page: Any, host: str, port: int) -> Iterator[str]:
    """Serve the page inside the context. Yield its URL."""
    gradio = import_gradio()
    theme = gradio.themes.Default(**FONTS)
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,  # gradio's form of an IPv6 address
        server_port=port, share=False, max_file_size=MAX_UPLOAD, prevent_thread_lock=True, quiet=True,
        ssr_mode=False, mcp_server=False, enable_monitoring=False, footer_links=[], theme=theme,
    )  # fmt: skip
    try:
        yield page.local_url
    finally:
        page.close(verbose=False)


def serve(
    source: str | Path, overrides: Sequence[str], against: str | None, host: str, port: int, ema: bool = False
) -> None:
    """Load the models and serve the page until the process is interrupted. Arguments as in `reca serve`."""
    import_gradio()
    check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is deleted on SIGTERM, too
    with tempfile.TemporaryDirectory(prefix="reca_serve_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results are deleted with it
        requests = Requests(open_sides(source, overrides, against, ema, usable_device(None)))
        with served(make_page(requests, f"reca: {source}"), host, port) as address:
            print(f"serving {source} at {address}; stop with Ctrl-C", flush=True)
            threading.Event().wait()
