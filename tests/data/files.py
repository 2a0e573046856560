"""Small files for the tests of data: images, folders, tars and conversations."""

import io
import json
import tarfile

from PIL import Image


def encoded(image, format="PNG", **options):
    """The bytes of a file. options: of Pillow's writer."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_bytes(color=(200, 30, 30), size=(8, 8), mode="RGB", format="PNG", **options):
    return encoded(Image.new(mode, size, color), format, **options)


def fill(root, files):
    """Write {name: bytes} below `root`, which is returned."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar(path, *members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes), or of (name, (type, link target)). Its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                out.addfile(info)
            else:
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def said(*turns):
    """said("human", "Q", "gpt", "A"): the turns of a row."""
    return [{"from": who, "value": text} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def row(*turns, image="a.png"):
    return {"image": image, "conversations": said(*turns)}


def conversations(root, *rows):
    """A file of rows beside the images a.png and b.png. Its path."""
    fill(root, {"a.png": image_bytes(), "b.png": image_bytes((1, 2, 3))})
    path = root / "rows.json"
    path.write_text(json.dumps(list(rows)))
    return path
