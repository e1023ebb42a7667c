"""The vision tower's features on disk: one safetensors file per video, written by `encode`, read instead of pixels.

What is kept is what `vision.look` gives: before the connector, which can go on learning. That costs 24 KB a frame
at 256M (k = 1, float16); 256M's pixels are 786 KB and its tower takes seconds of a CPU core. The layer "connector"
is kept for a connector that does not learn: 1 KB. Files are memory-mapped; a window reads its own rows, nothing else.

A file names the weights that made it (a fingerprint of the tower's, and the connector's): features of other ones are
refused, not trained on. It is written beside its place and renamed: whatever lies there is whole. A checksum per frame
is compared when the frame is read: a byte that changed since is an error, not another number.

    F frames asked for    N frames of a file    k tokens per frame    D length of a feature
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.schema import is_inside
from pipeline.storage import replacing
from pipeline.terminal import command

Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
FORMAT = "2"
LAYERS = ("vision", "connector")  # before the connector, after it
STORED = {"float16": "F16", "float32": "F32"}  # numpy's name, safetensors' name
OPEN_FILES = 64


@dataclass(frozen=True)
class Provenance:
    """Where a file's features come from; in its header as strings."""

    video_uid: str
    fps: float
    source: str  # name of the file or folder with the frames
    source_bytes: int
    model: str  # as it was given
    revision: str  # the hub's commit, where there is one
    fingerprint: str  # of the weights that the layer is made by
    k: int
    side: int  # of the square frames, pixels
    computed: str  # float32 or bfloat16
    stored: str  # float16 or float32
    layer: str = "vision"  # the tower's last hidden state, pixel-shuffled, pooled to k; or "connector": its output
    format: str = FORMAT

    def header(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}


def feature_path(folder: Path, video_uid: str, fps: float) -> Path:
    """Where a video's features lie, a long name cut; InputError for a name that leads out of the folder."""
    if not is_inside(video_uid):
        raise InputError(f"video {video_uid!r}: leads out of {folder}; rename the video, and preprocess again")
    rate = np.format_float_positional(np.float32(fps), trim="-")  # 2.0 -> 2, 29.97 -> 29.97
    above, name = os.path.split(video_uid)
    if len(name.encode()) > 200:  # files may have names of 255 bytes
        name = name.encode()[:120].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return folder / above / f"{name}.{rate}fps.safetensors"


def write_features(
    path: Path, about: Provenance, frames: npt.NDArray[np.int32], width: int, blocks: Iterable[Features]
) -> int:
    """A video's file from `blocks` [n, k, D] that add up to its `frames` [N] (ascending); returns its bytes.

    Holds one block at a time: at k = 64 an hour at 2 fps is 11 GB.
    """
    with replacing(path) as new, new.open("wb") as file:
        file.write(_header(about, len(frames), width))
        file.write(frames.astype("<i4").tobytes())
        sums: list[int] = []
        for block in blocks:
            assert (*block.shape[1:], block.dtype) == (about.k, width, about.stored)
            file.write(np.ascontiguousarray(block).data)
            sums += _checksums(block, frames[len(sums) :])
        assert len(sums) == len(frames)
        file.write(np.array(sums, "<u4").tobytes())
    return path.stat().st_size


def _header(about: Provenance, count: int, width: int) -> bytes:
    shape = [count, about.k, width]
    ends = [4 * count, 4 * count + math.prod(shape) * np.dtype(about.stored).itemsize]
    ends.append(ends[1] + 4 * count)
    tensors = {
        "frames": {"dtype": "I32", "shape": [count], "data_offsets": [0, ends[0]]},
        "features": {"dtype": STORED[about.stored], "shape": shape, "data_offsets": ends[:2]},
        "checksums": {"dtype": "U32", "shape": [count], "data_offsets": ends[1:]},
    }
    text = json.dumps({"__metadata__": about.header(), **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksums(block: Features, frames: npt.NDArray[np.int32]) -> list[int]:
    """CRC-32 of each of the block's frames, its number with it."""
    return [zlib.crc32(row.data, int(n)) for row, n in zip(np.ascontiguousarray(block), frames, strict=False)]


class FeatureFile(NamedTuple):
    """An open file: `features[a:b]` are those rows, not yet read."""

    about: dict[str, str]  # Provenance.header()
    frames: npt.NDArray[np.int32]  # [N] absolute numbers, ascending
    features: Features  # [N, k, D], memory-mapped: a copy costs as much as all else that reading does
    checksums: npt.NDArray[np.uint32]  # [N]

    def rows(self, first: int, end: int) -> Features | None:
        """[end - first, k, D], memory-mapped; None where one of them is not what was written."""
        found = self.features[first:end]
        same = _checksums(found, self.frames[first:end]) == self.checksums[first:end].tolist()
        return found if same else None

    def sound(self) -> bool:
        """Whether every frame is what was written; reads all of the file, some at a time."""
        count = len(self.frames)
        return all(self.rows(at, min(at + 256, count)) is not None for at in range(0, count, 256))


def open_features(path: Path) -> FeatureFile:
    """Raises InputError for a file that is missing, cut off, or not one of ours."""
    try:
        file = safe_open(path, framework="numpy")
        about, frames, features = file.metadata() or {}, file.get_tensor("frames"), file.get_slice("features")
        checksums = file.get_tensor("checksums") if about.get("format") == FORMAT else None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no features ({error}); run prospect-dst encode") from None
    if checksums is None:
        found = about.get("format", "none")
        raise InputError(f"{path}: features of format {found}, expected {FORMAT}; delete it, run prospect-dst encode")
    kinds, shape = (frames.dtype, checksums.dtype), features.get_shape()
    stored = {name: kind for kind, name in STORED.items()}.get(features.get_dtype())
    if (
        stored is None
        or kinds != (np.int32, np.uint32)
        or len(shape) != 3
        or not frames.shape == checksums.shape == (shape[0],)
    ):
        raise InputError(f"{path}: damaged (its parts do not fit together); delete it, run prospect-dst encode")
    at = path.stat().st_size - checksums.nbytes - math.prod(shape) * np.dtype(stored).itemsize  # as `_header` says
    return FeatureFile(about, frames, np.memmap(path, stored, "c", at, tuple(shape)), checksums)  # c: torch warns of r


def kept_layer(folder: Path) -> str:
    """The layer whose features are in the folder, by the first file there; "vision" where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected features; run {command('encode', '--out', folder)}")
    first = next(folder.rglob("[!.]*.safetensors"), None)
    return "vision" if first is None else open_features(first).about.get("layer", "vision")


class CachedFeatures:
    """A FrameSource of what `encode` wrote into `folder`: that layer, by weights of that `vision.fingerprint`.

    k may be smaller than the files', where their square grid divides into k's: pooling again is exact.
    May be pickled; open files stay behind.
    """

    def __init__(self, folder: Path, fingerprint: str, k: int = 1, layer: str = "vision") -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected features; run {command('encode', '--out', folder)}")
        self.folder, self.fingerprint, self.k, self.layer = folder, fingerprint, k, layer
        self._open: OrderedDict[Path, FeatureFile] = OrderedDict()

    def load(self, clip: ClipExample, start: int, end: int) -> Features:
        """[F, k, D], in the type that is stored (float32 where it is pooled on the way); memory-mapped."""
        file, first = self._find(clip, start, end)
        found = file.rows(first, first + end - start)
        if found is None:
            path, mend = feature_path(self.folder, clip.video_uid, clip.fps), "delete it, run prospect-dst encode"
            raise InputError(f"{path}: damaged in the frames {start} to {end - 1} (checksums differ); {mend}")
        return _pool(found, self.k)

    def check(self, clip: ClipExample) -> None:
        """InputError unless every frame of the clip is there."""
        self._find(clip, clip.start_frame, clip.end_frame)

    def _find(self, clip: ClipExample, start: int, end: int) -> tuple[FeatureFile, int]:
        """The clip's file, and the row of frame `start` in it."""
        path = feature_path(self.folder, clip.video_uid, clip.fps)
        file = self._opened(path, clip)
        first = int(np.searchsorted(file.frames, start))
        found = file.frames[first : first + end - start]
        if not np.array_equal(found, np.arange(start, end)):
            missing = np.setdiff1d(np.arange(start, end), file.frames)[0]
            raise InputError(
                f"{path}: {len(file.frames)} frames, but not {missing} of clip {clip.clip_id}; "
                f"run prospect-dst encode on this data too"
            )
        return file, first

    def _opened(self, path: Path, clip: ClipExample) -> FeatureFile:
        if path not in self._open:
            if not path.is_file():
                raise InputError(
                    f"clip {clip.clip_id}: no features of its video at {path}; run prospect-dst encode on this data"
                )
            file = open_features(path)
            self._check(path, file, clip)
            self._open[path] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _check(self, path: Path, file: FeatureFile, clip: ClipExample) -> None:
        about, (_, k, _) = file.about, file.features.shape
        told, asked = (about.get("video_uid"), about.get("fps")), (clip.video_uid, str(clip.fps))
        if told != asked:
            raise InputError(
                f"{path}: of the video {told[0]} at {told[1]} fps, expected {asked[0]} at {asked[1]}; "
                f"delete it, run prospect-dst encode"
            )
        if about.get("layer") != self.layer:
            raise InputError(
                f"{path}: features of the layer {about.get('layer')}, but others in this folder of {self.layer}; "
                f"delete one kind, run prospect-dst encode"
            )
        if about.get("fingerprint") != self.fingerprint:
            what = "vision tower" if self.layer == "vision" else "vision tower and connector"
            raise InputError(
                f"{path}: made by the {what} {about.get('fingerprint')} ({about.get('model')}), but this "
                f"model's is {self.fingerprint}; run prospect-dst encode again with this model"
            )
        if k < self.k or math.isqrt(k) % math.isqrt(self.k):
            raise InputError(
                f"{path}: {k} tokens per frame, which do not pool to {self.k}; "
                f"run prospect-dst encode again with --tokens-per-frame {self.k}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _pool(features: Features, k: int) -> Features:
    """[F, n, D] -> [F, k, D]: `vision.pool`, for a grid that divides, without torch."""
    count, n, width = features.shape
    if n == k:
        return features
    side, step = math.isqrt(k), math.isqrt(n // k)
    grid = features.astype(np.float32).reshape(count, side, step, side, step, width)
    return grid.mean((2, 4), dtype=np.float32).reshape(count, k, width)
