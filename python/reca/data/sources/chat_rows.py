"""Parsing of a row of a LLaVA-style file or table: the image name and the turns about it."""

import os
from collections.abc import Sequence
from typing import Any

from reca.data.sources.remote import AnyPath, RemotePath
from reca.data.sources.skipped import Skipped
from reca.data.tasks import Turn
from reca.data.text import encodable

IMAGE = "<image>"
LONGEST_NAME = 4096  # characters of an image's path or URL; images in base64 have more
# Keys by which other trainers leave an answer out of the loss, where they are false or 0.
TRAINED = ("loss", "train", "weight")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason, and completes the sentence "N rows that ..."."""


def _value(item: dict, name: str, other: str) -> Any:
    """Return the value of a row or turn under either of two names. Raises BadRow if both exist and differ."""
    found = [item[key] for key in (name, other) if item.get(key) is not None]
    if len(found) == 2 and found[0] != found[1] and [found[0]] != found[1]:
        raise BadRow(f'have both "{name}" and "{other}", which differ')
    return found[0] if found else None


def image_name(item: Any, root: str) -> str:
    """Return the image's path below `root`. Raises BadRow."""
    if not isinstance(item, dict):
        raise BadRow("are not JSON objects")
    image = _value(item, "image", "images")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None or image == "" or image == []:
        raise BadRow("have no image")
    if isinstance(image, list):
        raise BadRow("have more than one image")
    if not isinstance(image, str) or "\0" in image or not encodable(image):
        raise BadRow("have an image name that is not text")
    if len(image) > LONGEST_NAME:
        raise BadRow(f"have an image name of more than {LONGEST_NAME} characters (base64 is not read)")
    if "://" in image:
        raise BadRow("have an image at a URL (write its name, and the URL before it as data.image_root)")
    name = name_below(root, image)
    if name is None:
        raise BadRow("have an image outside data.image_root")
    return name


def name_below(root: str, path: str) -> str | None:
    """Return a path, absolute or relative to `root`, as a name below it without ".."; None if it is not below it."""
    name, inside = os.path.normpath(os.path.join(root, path)), os.path.join(root, "")
    return name.removeprefix(inside) if name.startswith(inside) and name != inside else None


def absolute(root: AnyPath) -> str:
    """Return the root for `name_below`: an absolute folder, or for URLs a placeholder, as names are only relative."""
    return "/address" if isinstance(root, RemotePath) else os.path.abspath(root)


def turns(item: dict, number: int, skipped: Skipped) -> tuple[Turn, ...]:
    """Return the turns of a row: pairs of question and answer. Raises BadRow.

    number: of the row, from 1. Record a last question without an answer in `skipped`.
    """
    said = _said(item)
    opening = _system(item, said.pop(0)[1] if said and said[0][0] == "system" else "")
    # The placeholder may be a separate turn before the question.
    if len(said) > 1 and said[0][0] == said[1][0] == "human" and said[0][1].strip() == IMAGE:
        said[:2] = [("human", f"{IMAGE}\n{said[1][1]}")]
    if len(said) < 2:
        raise BadRow("have no answer")
    if any(role != ("human", "gpt")[place % 2] for place, (role, _) in enumerate(said)):
        raise BadRow("have turns that do not alternate between human and gpt, human first")
    pairs = _pairs([text for _, text in said], opening)
    if len(said) % 2:
        skipped.add("last questions without an answer (the rest of their rows is used)", f"row {number}")
    return pairs


def _system(item: dict, turn: str) -> str:
    """Return the system prompt of a row: its "system" key, as in ShareGPT files, or `turn`, its leading turn."""
    own = _text(item.get("system"))
    if own is None or own == "":
        return turn
    if not isinstance(own, str) or not encodable(own) or "\0" in own:
        raise BadRow('have a "system" that is not text')
    if turn and turn != own:
        raise BadRow('have both "system" and a system turn, which differ')
    return own


def _said(item: dict) -> list[tuple[str, str]]:
    """Return (role, text) of every turn. Raises BadRow."""
    turns = _value(item, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("have no conversation")
    said = []
    for turn in turns:
        text = _text(_value(turn, "value", "content")) if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise BadRow("have a turn whose value is not text")
        role = _value(turn, "from", "role")
        role = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if role is None:
            raise BadRow("have a turn from a role other than human, gpt or system")
        if role == "gpt" and any(turn.get(key) in (False, 0) for key in TRAINED):
            raise BadRow('have an answer marked as not to be trained on (by "loss", "train" or "weight")')
        if not encodable(text) or "\0" in text:
            raise BadRow("have a turn with lone surrogates or NUL characters")
        said.append((role, text))
    return said


def _text(content: Any) -> Any:
    """Join a list of parts as transformers' chat templates do, an image as IMAGE. Return other content unchanged."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [IMAGE if part.get("type") == "image" else part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _pairs(texts: Sequence[str], opening: str) -> tuple[Turn, ...]:
    """Pair alternating texts into turns. opening: system prompt, prepended to the first question. Raises BadRow."""
    first, *rest = texts
    if first.count(IMAGE) > 1:
        raise BadRow("have more than one <image> for one image")
    if IMAGE in opening or any(IMAGE in text for text in rest):
        raise BadRow("have an <image> after the first question")
    parts = (opening.strip(), first.replace(IMAGE, "").strip())
    texts = ["\n".join(part for part in parts if part), *(text.strip() for text in rest)]
    if not all(texts[1::2]):
        raise BadRow("have an empty answer")
    return tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=False))
