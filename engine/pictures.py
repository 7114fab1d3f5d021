"""Pictures as text, a letter for each pixel from the upper left on, and back: as PNG.

A letter is a brightness, A black and / white, whatever the number of greys is: so a text is a
picture without more being known, and a vocabulary of bytes has a token for each pixel.
"""

import math
import string
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
KINDS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ZOOM = 4  # dots of a PNG for a pixel
EDGE = 1  # pixels between two pictures of a grid


def letters(pixels: np.ndarray, greys: int) -> str:
    """Pixels of a brightness from 0 to 1, rounded to one of so many greys, as text."""
    level = np.rint(np.asarray(pixels, float).ravel() * (greys - 1)) / (greys - 1)
    return "".join(LETTERS[i] for i in np.rint(level * (len(LETTERS) - 1)).astype(int))


def pixels(text: str, width: int, height: int) -> np.ndarray:
    """The brightness from 0 to 1 of each pixel (height, width); what is no letter, or lacks, is
    black, and what is too much is left out."""
    known = [max(0, LETTERS.find(c)) for c in text[: width * height]]
    known += [0] * (width * height - len(known))
    return np.reshape(known, (height, width)) / (len(LETTERS) - 1)


def size(text: str, width: int = 0) -> tuple[int, int]:
    """Width and height of a picture, square unless told. Raises ValueError if it is not."""
    across = width or math.isqrt(len(text))
    if not across or len(text) % across or (not width and across**2 != len(text)):
        raise ValueError(
            f"{len(text)} letters make no picture of width {across}: give --width, if it is another"
        )
    return across, len(text) // across


def grid(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size, beside and below each other on middle grey, (H, W) from 0 to 1."""
    height, width = (n + EDGE for n in pictures[0].shape)
    rows = -(-len(pictures) // columns)
    whole = np.full((rows * height + EDGE, columns * width + EDGE), 0.5)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * height + EDGE, (i % columns) * width + EDGE
        whole[y : y + height - EDGE, x : x + width - EDGE] = picture
    return whole


def png(picture: np.ndarray) -> bytes:
    """A PNG file of 8-bit greys (w3.org/TR/png): a header, the compressed lines, an end."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    dots = np.rint(picture * 255).astype(np.uint8).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    height, width = dots.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, not interlaced
    lines = b"".join(b"\0" + line.tobytes() for line in dots)  # 0: as they are, without a filter
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def row(task: str, label: str, text: str) -> dict:
    """A label and what it asks for: one of many pictures, so labels stand in all splits."""
    turns = [dict(role="user", content=label), dict(role="assistant", content=text)]
    return dict(messages=turns, task=task, open_ended=True)


def folder(path: Path, greys: int) -> Iterator[tuple]:
    """The pictures of a folder, as a table: where, and the row. The label of each is the name of
    the folder it is in. All have the size of the first. Raises ValueError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as e:
        raise ValueError(f"reading the pictures of {path} needs pillow: pip install pillow") from e
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS)
    if not files:
        raise ValueError(f"no picture in {path}: {', '.join(KINDS)} are read")
    wanted = None
    for file in files:
        try:
            with Image.open(file) as image:
                found = np.asarray(image.convert("L")) / 255
        except (UnidentifiedImageError, OSError) as e:
            yield file, ValueError(f"no picture that can be read ({e})")
            continue
        wanted = wanted or found.shape
        if found.shape != wanted:
            sizes = ["{1} x {0}".format(*shape) for shape in (found.shape, wanted)]
            yield file, ValueError(f"it has {sizes[0]} pixels, and the first one {sizes[1]}")
            continue
        yield file, row("pictures", file.parent.name, letters(found, greys))
