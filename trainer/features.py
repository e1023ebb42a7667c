"""What the vision tower sees of a frame: k feature vectors, computed here, and kept on disk by `encode`.

    run_tower      pixels -> tower -> pixel shuffle -> pooled to k        frozen: run once by `encode`
    run_connector  features -> the connector's one linear layer           cheap: run in every step, may be trained

The connector has no bias and no activation, so pooling before it gives the same numbers as after it (to float
rounding) at 1/64 of its cost for k = 1, and what is cached still lets the connector learn. The price is size: at 256M a
token is 24 KB in float16 where the connector's output, the layer "connector", has 1 KB and pixels 786 KB. A file holds
a video's features, a fingerprint of the weights that made them, and a checksum per frame, compared when it is read.
The tower's parts are called directly: the model's own image path drops frames that are exactly zero after
normalisation, waits for the GPU to look whether patches are masked, and in bfloat16 transformers 5.17 gives them wrong
positions.

    N frames of a pass or a file    F frames asked for    S side in pixels    k tokens per frame    H hidden
    D length of a feature: vision width x scale factor^2
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.storage import replacing

if TYPE_CHECKING:
    from transformers import SmolVLMForConditionalGeneration

Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
FORMAT = "2"
ENCODE = "run prospect-dst encode"
LAYERS = ("vision", "connector")  # before the connector, after it
STORED = ("float16", "float32")
VISION_CHUNK = 64  # frames per pass of the vision tower


def frame_side(vlm: SmolVLMForConditionalGeneration) -> int:
    """S: side of the square frames it takes, in pixels."""
    return int(vlm.config.vision_config.image_size)


def feature_width(vlm: SmolVLMForConditionalGeneration, layer: str = "vision") -> int:
    """D: length of one feature vector; H after the layer "connector"."""
    if layer == "connector":
        return int(vlm.config.text_config.hidden_size)
    return int(vlm.config.vision_config.hidden_size) * int(vlm.config.scale_factor) ** 2


def run_tower(vlm: SmolVLMForConditionalGeneration, pixels: Tensor, k: int, chunk: int = VISION_CHUNK) -> Tensor:
    """float [N, k, D] of RGB pixels 0..255 [N, 3, S, S], `chunk` frames at a time."""
    assert pixels.shape[1:] == (3, frame_side(vlm), frame_side(vlm)), tuple(pixels.shape)
    tower, features = vlm.model.vision_model, []
    for part in pixels.split(chunk):
        normalised = (part.float() / 255 - 0.5) / 0.5
        # [N, P, H_v], contiguous: strided additions and copies of all layers took 20 of 63 ms on an H100 (64 frames)
        patches = tower.embeddings.patch_embedding(normalised).flatten(2).mT.contiguous()
        positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        placed = patches + tower.embeddings.position_embedding(positions)
        hidden = tower.post_layernorm(tower.encoder(inputs_embeds=placed, attention_mask=None).last_hidden_state)
        features.append(pool(vlm.model.connector.pixel_shuffle(hidden, vlm.config.scale_factor), k))
    return torch.cat(features)


def run_connector(vlm: SmolVLMForConditionalGeneration, features: Tensor) -> Tensor:
    """[N, k, H] of `run_tower`'s features [N, k, D]."""
    return vlm.model.connector.modality_projection(features)


def pool(features: Tensor, k: int) -> Tensor:
    """[N, n, D] -> [N, k, D]: the n vectors, row by row of a square grid, averaged down to k."""
    old, new = math.isqrt(features.shape[1]), math.isqrt(k)
    grid = features.mT.unflatten(2, (old, old))  # [N, D, old, old]
    return F.adaptive_avg_pool2d(grid, new).flatten(2).mT


def most_tokens(vlm: SmolVLMForConditionalGeneration) -> int:
    """Tokens a frame has before pooling: 64 or 81 for the released models, 1 for tiny."""
    vision, scale = vlm.config.vision_config, vlm.config.scale_factor
    return int(vision.image_size // vision.patch_size // scale) ** 2


def fingerprint(vlm: SmolVLMForConditionalGeneration, layer: str = "vision") -> str:
    """16 hex digits of a SHA-256 over the tower's weights, and for the layer "connector" the connector's."""
    digest = hashlib.sha256()
    parts = [vlm.model.vision_model, *([vlm.model.connector] if layer == "connector" else [])]
    for name, value in (item for part in parts for item in sorted(part.state_dict().items())):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def feature_path(folder: Path, video_uid: str, fps: float) -> Path:
    """A video's file in `folder`, a long name cut."""
    rate = np.format_float_positional(np.float32(fps), trim="-")  # 2.0 -> 2, 29.97 -> 29.97
    above, name = os.path.split(video_uid)
    if len(name.encode()) > 200:  # files may have names of 255 bytes
        name = name.encode()[:120].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return folder / above / f"{name}.{rate}fps.safetensors"


def write_features(path: Path, header: dict[str, Any], frames: npt.NDArray[np.int32], features: Features) -> None:
    """A video's file from the features [N, k, D] of its `frames` [N] (ascending); `header` as `encode` makes it."""
    arrays = {"features": features, "frames": frames, "checksums": _checksums(features, frames)}
    provenance = {name: str(value) for name, value in {**header, "format": FORMAT}.items()}
    with replacing(path) as new:
        new.write_bytes(save(arrays, {"provenance": json.dumps(provenance)}))  # of several keys the order varies


def _checksums(features: Features, frames: npt.NDArray[np.int32]) -> npt.NDArray[np.uint32]:
    """[N]: CRC-32 of each frame's features [k, D] and its number."""
    rows = zip(features, frames.tolist(), strict=True)
    return np.array([zlib.crc32(np.ascontiguousarray(row).data, number) for row, number in rows], np.uint32)


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
            self.checksums: npt.NDArray[np.uint32] = file.get_tensor("checksums").numpy()
            self.features: Features = file.get_tensor("features").numpy()
        except (OSError, SafetensorError) as error:
            advice = "name another --features, or delete it and " if path.is_file() else ""
            raise InputError(f"{path}: no features ({error}); {advice}{ENCODE} on this data") from None

    def rows(self, first: int, end: int) -> Features | None:
        """[end - first, k, D], memory-mapped; None where a checksum differs."""
        features = self.features[first:end]
        sums = _checksums(features, self.frames[first:end])
        return features if np.array_equal(sums, self.checksums[first:end]) else None


def kept_layer(folder: Path) -> str:
    """The layer whose features are in the folder, by the first file there; "vision" where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected features; {ENCODE}")
    first = next(folder.rglob("[!.]*.safetensors"), None)
    return "vision" if first is None else FeatureFile(first).header["layer"]


class CachedFeatures:
    """A FrameSource of what `encode` wrote into `folder`, by weights of that `fingerprint`; may be pickled.

    k may be smaller than the files', where their square grid divides into k's: pooling again is exact.
    """

    def __init__(self, folder: Path, fingerprint: str, k: int = 1) -> None:
        self.folder, self.fingerprint, self.k = folder, fingerprint, k
        self._open: dict[Path, FeatureFile] = {}

    def load(self, clip: ClipExample, start: int, end: int) -> Features:
        """[F, k, D], in the type that is stored (float32 where it is pooled on the way); memory-mapped."""
        file, first = self._find(clip, start, end)
        features = file.rows(first, first + end - start)
        if features is None:
            problem = f"damaged in the frames {start} to {end - 1} (checksums differ)"
            raise InputError(f"{file.path}: {problem}; delete it, {ENCODE}")
        return features if features.shape[1] == self.k else pool(torch.from_numpy(features).float(), self.k).numpy()

    def find(self, clip: ClipExample) -> Path:
        """The file with the clip's features; InputError unless every frame of the clip is there."""
        return self._find(clip, clip.start_frame, clip.end_frame)[0].path

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
