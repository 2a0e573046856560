"""JPEGs cropped from the photographs in scikit-image, which need no network."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry")
QUALITY = 90  # with 4:2:0 chroma subsampling, as in most JPEGs


def jpeg(number: int, side: int) -> bytes:
    """Return a JPEG of side x side pixels: a crop of a photo at its own resolution, with reflected borders."""
    from skimage import data

    photo = getattr(data, PHOTOS[number % len(PHOTOS)])()
    height, width = photo.shape[:2]
    top, left = 37 * number % height, 53 * number % width
    wide = np.pad(photo, ((0, top + side), (0, left + side), (0, 0)), "symmetric")
    buffer = io.BytesIO()
    Image.fromarray(wide[top : top + side, left : left + side]).save(buffer, "JPEG", quality=QUALITY, subsampling=2)
    return buffer.getvalue()


def write(folder: Path, side: int, count: int) -> list[bytes]:
    """Write folder/images/all/*.jpg (one class for torchvision) and folder/images.tar. Return the encoded files."""
    files = [jpeg(number, side) for number in range(count)]
    (folder / "images" / "all").mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, file in enumerate(files):
            (folder / "images" / "all" / f"{number:04}.jpg").write_bytes(file)
            member = tarfile.TarInfo(f"{number:04}.jpg")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    return files
