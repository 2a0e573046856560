"""Decoding of text files: captions, templates and conversations."""

import codecs

# The mark of UTF-32-LE begins with that of UTF-16-LE, so it is tried first.
SIGNATURES = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or the encoding of a byte order mark. Remove the mark and convert line ends to \\n.

    errors: as in bytes.decode. Raises ValueError with the reason.
    """
    encoding = "utf-8"
    for mark, name in SIGNATURES:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise ValueError(f"the text is not {encoding.upper()} ({found}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("the text contains NUL characters, like UTF-16 without a byte order mark: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def one_line(text: str) -> str:
    """Return a name as it is printed: line breaks and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def encodable(text: str) -> bool:
    """Return whether a tokenizer can encode the text: JSON may contain lone surrogates, which are not characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
