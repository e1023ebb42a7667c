"""The vision tower's features on disk: one safetensors file per video, written by `encode`, read instead of pixels.

They are `vision.look`'s, before the connector, which can go on learning: 24 KB a frame at 256M (k = 1, float16), where
pixels are 786 KB and the tower takes seconds of a CPU core. The layer "connector" is its output, 1 KB, for training
that freezes it. A file names the weights that made it, by fingerprint, and has a checksum per frame, compared when the
frame is read. Files are memory-mapped: a window reads its own rows, and an open file holds no file descriptor.

    F frames asked for    N frames of a file    k tokens per frame    D length of a feature
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.storage import replacing
from pipeline.terminal import command
from trainer import vision

Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
FORMAT = "2"
ENCODE = "run prospect-dst encode"
LAYERS = ("vision", "connector")  # before the connector, after it
STORED = ("float16", "float32")


def feature_path(folder: Path, video_uid: str, fps: float) -> Path:
    """A video's file in `folder`."""
    rate = np.format_float_positional(np.float32(fps), trim="-")  # 2.0 -> 2, 29.97 -> 29.97
    return folder / f"{video_uid}.{rate}fps.safetensors"


def write_features(path: Path, header: dict[str, Any], frames: npt.NDArray[np.int32], features: Features) -> None:
    """A video's file from the features [N, k, D] of its `frames` [N] (ascending); `header` as `encode` makes it."""
    sums = [_checksum(row, number) for row, number in zip(features, frames.tolist(), strict=True)]
    arrays = {"features": features, "frames": frames, "checksums": np.array(sums, np.uint32)}
    provenance = {name: str(value) for name, value in {**header, "format": FORMAT}.items()}
    with replacing(path) as new:
        new.write_bytes(save(arrays, {"provenance": json.dumps(provenance)}))  # of several keys the order varies


def _checksum(row: Features, number: int) -> int:
    """CRC-32 of a frame's features [k, D] and its number."""
    return zlib.crc32(np.ascontiguousarray(row).data, number)


class FeatureFile:
    """An open file: `frames` [N] are absolute numbers, ascending; `features` [N, k, D] are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """InputError for a file that is missing, cut off, or not of this format."""
        self.path = path
        try:
            file = safe_open(path, framework="pt")
            self.header: dict[str, str] = json.loads((file.metadata() or {}).get("provenance", "{}"))
            if self.header.get("format") != FORMAT:
                raise SafetensorError(f"format {self.header.get('format')}, expected {FORMAT}")
            self.frames: npt.NDArray[np.int32] = file.get_tensor("frames").numpy()
            self.checksums: list[int] = file.get_tensor("checksums").tolist()
            self.features: Features = file.get_tensor("features").numpy()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: no features ({error}); delete it if it is there, {ENCODE} on this data"
            ) from None

    def rows(self, first: int, end: int) -> Features | None:
        """[end - first, k, D], memory-mapped; None where a checksum differs."""
        found = self.features[first:end]
        sums = [_checksum(row, number) for row, number in zip(found, self.frames[first:end].tolist(), strict=True)]
        return found if sums == self.checksums[first:end] else None


def kept_layer(folder: Path) -> str:
    """The layer whose features are in the folder, by the first file there; "vision" where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected features; run {command('encode', '--out', folder)}")
    first = next(folder.rglob("[!.]*.safetensors"), None)
    return "vision" if first is None else FeatureFile(first).header["layer"]


class CachedFeatures:
    """A FrameSource of what `encode` wrote into `folder`, by weights of that `vision.fingerprint`.

    k may be smaller than the files', where their square grid divides into k's: pooling again is exact.
    May be pickled; open files stay behind.
    """

    def __init__(self, folder: Path, fingerprint: str, k: int = 1) -> None:
        self.folder, self.fingerprint, self.k = folder, fingerprint, k
        self._open: dict[Path, FeatureFile] = {}

    def load(self, clip: ClipExample, start: int, end: int) -> Features:
        """[F, k, D], in the type that is stored (float32 where it is pooled on the way); memory-mapped."""
        file, first = self._find(clip, start, end)
        found = file.rows(first, first + end - start)
        if found is None:
            what = f"damaged in the frames {start} to {end - 1} (checksums differ)"
            raise InputError(f"{file.path}: {what}; delete it, {ENCODE}")
        return found if found.shape[1] == self.k else vision.pool(torch.from_numpy(found).float(), self.k).numpy()

    def check(self, clip: ClipExample) -> None:
        """InputError unless every frame of the clip is there."""
        self._find(clip, clip.start_frame, clip.end_frame)

    def _find(self, clip: ClipExample, start: int, end: int) -> tuple[FeatureFile, int]:
        """The clip's file, and the row of frame `start` in it."""
        path = feature_path(self.folder, clip.video_uid, clip.fps)
        if path not in self._open:
            file = FeatureFile(path)
            if file.header["fingerprint"] != self.fingerprint:
                by = f"{file.header['layer']} weights {file.header['fingerprint']} ({file.header['model']})"
                raise InputError(f"{path}: made by {by}, this model's are {self.fingerprint}; {ENCODE} with this model")
            if math.isqrt(k := int(file.header["k"])) % math.isqrt(self.k):
                other = f"{k} tokens per frame, which do not pool to {self.k}"
                raise InputError(f"{path}: {other}; {ENCODE} again with --tokens-per-frame {self.k}")
            self._open[path] = file
        file, wanted = self._open[path], np.arange(start, end)
        first = int(np.searchsorted(file.frames, start))
        if not np.array_equal(file.frames[first : first + len(wanted)], wanted):
            lacks = f"{len(file.frames)} frames, but not {np.setdiff1d(wanted, file.frames)[0]} of clip {clip.clip_id}"
            raise InputError(f"{path}: {lacks}; {ENCODE} on this data too")
        return file, first

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFeatures, (self.folder, self.fingerprint, self.k)
