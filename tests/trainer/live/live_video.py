"""Videos and images whose pictures are shades of grey, by number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def grey(value: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def write_video(path: Path, count: int, rate: Fraction | int = 30, step: int = 1, **options: str) -> Path:
    """Picture i is `step` * i bright."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"qp": "1", **options}
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(step * i), "rgb24")))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, names: list[str]) -> Path:
    """The i-th image is 10 * i bright."""
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(grey(10 * i)).save(folder / name)
    return folder


def shades(pixels: np.ndarray) -> list[int]:
    """The number of each of `write_images`'s pictures [F, 3, S, S]."""
    return [round(float(one.mean()) / 10) for one in pixels]
