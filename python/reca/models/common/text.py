"""Tokenise users' text without interpreting control tokens in it.

Tokenizers match added tokens (<|im_end|>, <IMG_CONTEXT>, …) anywhere in a text, and `split_special_tokens=True` of
transformers prevents that only for tokens marked special. `encode` matches none of them. Prompts insert control tokens
by id (`control`), so that a user's text cannot end a turn or insert an image.
"""

import json
import re
import weakref
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reca.data.text import encodable
from reca.errors import first_line
from reca.io.files import damage

KNOWN = 1 << 12  # texts, such as templates, whose ids are kept per tokenizer
_PLAIN: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Plain]" = weakref.WeakKeyDictionary()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise text to ids without control tokens: none are added, and none in the text are interpreted.

    Raises ValueError for a text with unpaired surrogates, and for one that the tokenizer can only read as a control
    token.
    """
    if not encodable(text):
        raise ValueError(f"the text {text[:80]!r} is not valid Unicode (it has unpaired surrogates); re-enter it")
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # a slow tokenizer, not of the tokenizers library
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    size = tokenizer.backend_tokenizer.get_vocab_size()  # tells of tokens that were added since; listing them is slow
    plain = _PLAIN.get(tokenizer)
    if plain is None or plain.size != size:
        plain = _PLAIN[tokenizer] = _Plain(tokenizer)
    return [*plain.known(text)]


def control(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a control token. The tokenizer must have it (`check_tokenizer`)."""
    return tokenizer.convert_tokens_to_ids(token)


def read_tokenizer(folder: Path, as_is: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, without running code in it.

    as_is: load tokenizer.json unchanged, not through the class that tokenizer_config.json names, which may rebuild it.
    Raises ValueError with the folder, or with the damaged file if there is one.
    """
    try:
        if as_is:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        for path in sorted(folder.glob("*.json")):
            if cause := damage(path):
                raise ValueError(f"{path} {cause}") from error
        raise ValueError(
            f"{folder} contains no readable tokenizer ({first_line(error)}); set model.tokenizer"
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str], rows: int, model: str) -> None:
    """Raise ValueError if a tokenizer lacks one of `tokens`, or has ids beyond the `rows` of the embedding table."""
    known = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in known]:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}; {model} needs {', '.join(tokens)}")
    if (largest := max(known.values())) >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but model.language.vocab_size={rows}; raise it, or set "
            "model.tokenizer to that of the weights"
        )


class _Plain:
    """A copy of a tokenizer's backend that matches no added tokens except runs of whitespace, which are text (Phi)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = tokenizer.backend_tokenizer
        self.size = backend.get_vocab_size()
        made = json.loads(backend.to_str())
        for token in made["added_tokens"]:
            token["special"] = not token["content"].isspace()
        self.tokenizer = Tokenizer.from_str(json.dumps(made))
        self.tokenizer.encode_special_tokens = True  # encode them as text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        unknown = tokenizer.unk_token  # not a control token here: unknown words map to it
        controls = (t for t in made["added_tokens"] if t["special"] and t["content"] != unknown)
        self.controls = {token["id"]: token["content"] for token in controls}
        self.known = lru_cache(maxsize=KNOWN)(lambda text: self.encode(text))

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.controls.keys().isdisjoint(ids):
            return ids
        # The vocabulary itself has the control token and no pre-tokenizer splits it, as with Unigram: split it here.
        words = {self.controls[i] for i in ids if i in self.controls}
        inside = "|".join(f"(?<={re.escape(word[:1])})(?={re.escape(word[1:])})" for word in words)
        ids = [i for part in re.split(inside, text) for i in self.tokenizer.encode(part, add_special_tokens=False).ids]
        if found := [self.controls[i] for i in ids if i in self.controls]:
            raise ValueError(f"the tokenizer reads the text as the control token {found[0]!r}; rephrase the text")
        return ids
