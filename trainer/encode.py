"""Runs the vision tower once over every frame that a data folder needs, so that training needs no pixels.

A file is written when its video is complete: a killed run continues where it was, and a second run over the same data
does nothing. Many machines share the work as parts, or by a `mapper` (pipeline/cluster.py) that runs a task per video;
either way a video's file has the same bytes.

    n frames of a pass    k tokens per frame    D length of a feature    S side in pixels
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.cluster import Mapper, here
from pipeline.dataset import ClipExample, Split, read_manifest
from pipeline.errors import InputError
from pipeline.media import images_in
from pipeline.storage import LOCK, lock, make_folder
from pipeline.terminal import progress_bar
from trainer import features
from trainer.checkpoint import verify_model
from trainer.config import RANDOM_MODELS
from trainer.distributed import best_device
from trainer.frame_source import PixelFrames, open_frames
from trainer.loader import Transfer, fetched
from trainer.model import load_model

DTYPES = ("auto", "float32", "bfloat16")
READERS = min(16, os.cpu_count() or 1)  # threads that decode


@dataclass
class EncodeReport:
    """What was done; `refused` says of each video that has no features what is wrong with it."""

    computed: str  # float32 or bfloat16
    videos: int = 0  # written now
    skipped: int = 0  # complete before
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0  # of reading, computing and writing
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """A file to write."""

    path: Path
    header: dict[str, Any]  # of the file: where its features come from
    clip: ClipExample  # one of the video's
    frames: npt.NDArray[np.int32]  # ascending


def encode(
    data: Path,
    out: Path,
    model: str,
    k: int = 1,
    frames_root: Path | None = None,
    dtype: str = "auto",
    store: str = "float16",
    batch: int = 32,
    part: str = "1/1",
    mapper: Mapper | None = None,
    keep: str = "vision",
) -> EncodeReport:
    """Write the features of all videos of all splits of `data` into the folder `out`, k tokens per frame.

    `model`: a folder, a hub name or a run of ours. `dtype`, to compute in: auto is bfloat16 on CUDA, float32 elsewhere.
    `keep`: "vision", features before the connector, or "connector", after it. `part` "i/n": the i-th of n shares of the
    videos, i from 1; other parts may run at the same time. `mapper` runs the tower in other processes; None: here.
    A video whose frames are missing, short or damaged is refused, the rest is done; InputError where nothing is left.
    """
    choices = (("dtype", dtype, DTYPES), ("store", store, features.STORED), ("keep", keep, features.LAYERS))
    for name, value, known in choices:
        if value not in known:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    share, _, shares = part.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
        raise InputError(f"part is {part}, expected 1/N to N/N; --part counts from 1 (--array=1-N)")
    [device] = (mapper or here)(best_device, [()])  # on the machine that computes
    computed = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    tower = load_tower(model, k, keep, store, computed)
    manifest = read_manifest(data)
    source = PixelFrames(open_frames(manifest, frames_root, tower.side).root, tower.side, cache_bytes=0)
    report, started = EncodeReport(computed), time.monotonic()

    videos = defaultdict(list)  # clips without turns and labels: what holds those is freed
    for split in dict.fromkeys(shard["split"] for shard in manifest["shards"] if shard["clips"]):
        for clip in Split(data, split).in_order(rate=None):
            digest = hashlib.sha256(f"{clip.video_uid} {clip.fps:g}".encode()).digest()
            if int.from_bytes(digest[:8], "big") % int(shares) == int(share) - 1:
                lean = replace(clip, turns=(), labels=np.zeros((2, 0), np.int8))
                videos[clip.video_uid, clip.fps].append(lean)
    make_folder(out)
    taken = InputError(f"{out}: another run of part {part} is writing there; choose another --out")
    with lock(out / f"{LOCK}-{share}-of-{shares}", taken), progress_bar() as show:
        jobs = [job for clips in videos.values() if (job := _plan(clips, source, out, tower, report)) is not None]
        paths, frames = {job.path for job in jobs}, sum(len(job.frames) for job in jobs)
        for left in out.rglob(".*.new"):  # of a run that was killed: .NAME.01234567.new
            if left.with_name(left.name[1:-13]) in paths:
                left.unlink(missing_ok=True)
        if mapper is None:
            results = _encode_all(tower, jobs, source, batch, lambda done: show("encode", done, frames))
        else:
            results = mapper(_encode_there, [(job, source, batch) for job in jobs])
        with closing(results):
            for job, wrong in zip(jobs, results, strict=True):
                if wrong is not None:
                    report.refused.append(f"video {job.clip.video_uid}: {wrong}")
                    continue
                report.videos, report.frames = report.videos + 1, report.frames + len(job.frames)
                report.bytes += job.path.stat().st_size
                show("encode", report.frames, frames)
    report.seconds = time.monotonic() - started
    if report.refused and not report.videos and not report.skipped:
        raise InputError(f"{source.root}: none of {len(videos)} videos can be encoded; {report.refused[0]}")
    return report


def _plan(clips: list[ClipExample], source: PixelFrames, out: Path, tower: Tower, report: EncodeReport) -> _Job | None:
    """A video's job; None where a complete file is there, or no frames are. Frames that a file of the same kind has
    stay in it. What is wrong with the video goes into the report."""
    clip = clips[0]
    frames = np.unique(np.concatenate([np.arange(c.start_frame, c.end_frame, dtype=np.int32) for c in clips]))
    try:
        paths = {source.find(clip) for clip in clips}
        count = source.count(clip)
        if len(paths) > 1:
            raise InputError(f"its clips name several frames_files: {', '.join(sorted(map(str, paths)))}; keep one")
    except InputError as error:
        report.refused.append(f"video {clip.video_uid}: {error}")
        return None
    if (needed := frames[-1] + 1) > count:
        problem = f"{count} frames, but its clips need {needed}; those that are there are encoded"
        report.refused.append(f"video {clip.video_uid}: {problem}")
        frames = frames[frames < count]
        if not len(frames):
            return None
    path, header = features.feature_path(out, clip.video_uid, clip.fps), tower.header(clip, paths.pop())
    before = _frames_of_same(path, header)
    if np.isin(frames, before).all():
        report.skipped += 1
        return None
    return _Job(path, header, clip, np.union1d(frames, before))


def _frames_of_same(path: Path, header: dict[str, Any]) -> npt.NDArray[np.int32]:
    """Frames of an undamaged file of the same source and options."""
    try:
        file = features.FeatureFile(path)
    except InputError:
        return np.array([], np.int32)
    differs = {name for name, value in header.items() if file.header[name] != str(value)} - {"model", "revision"}
    if differs & {"layer", "fingerprint"}:
        by = f"the {file.header['layer']} features of {file.header['model']}"
        raise InputError(f"{path}: {by}, whose weights are others, are there, and kept; choose another --out")
    whole = not differs and file.rows(0, len(file.frames)) is not None
    return file.frames if whole else np.array([], np.int32)


class Tower:
    """A model's vision tower on the device, and how `encode` runs it."""

    def __init__(self, vlm: Any, model: str, k: int, keep: str, store: str, computed: str) -> None:
        """`model` is the name of the SmolVLM `vlm`, which is on the device already."""
        self.vlm, self.model, self.k, self.keep, self.store, self.computed = vlm, model, k, keep, store, computed
        self.side, self.width = features.frame_side(vlm), features.feature_width(vlm, keep)
        self.fingerprint = features.fingerprint(vlm, keep)
        self.transfer = Transfer(next(vlm.model.vision_model.parameters()).device)

    def header(self, clip: ClipExample, path: Path) -> dict[str, Any]:
        """Of the file of a clip's video, whose frames are at `path`: where its features come from."""
        return {
            "video_uid": clip.video_uid,
            "fps": clip.fps,
            "source": path.name,
            "source_bytes": sum(file.stat().st_size for file in (images_in(path) if path.is_dir() else [path])),
            "model": self.model,
            "revision": getattr(self.vlm.config, "_commit_hash", None) or "",  # of the hub, where there is one
            "fingerprint": self.fingerprint,
            "k": self.k,
            "side": self.side,
            "computed": self.computed,
            "stored": self.store,
            "layer": self.keep,
        }

    def features(self, passes: Iterable[Tensor]) -> Iterator[npt.NDArray[Any]]:
        """[n, k, D] of pixels [n, 3, S, S], a pass late."""
        bf16, store = self.computed == "bfloat16", getattr(torch, self.store)

        def start(pixels: Tensor) -> Callable[[], Tensor]:
            [pixels] = self.transfer.up([pixels])()
            with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
                seen = features.run_tower(self.vlm, pixels, self.k, chunk=len(pixels))
                seen = features.run_connector(self.vlm, seen) if self.keep == "connector" else seen
            return self.transfer.down(seen.to(store))

        return (block.numpy() for block in fetched(map(start, passes)))


def load_tower(model: str, k: int, keep: str, store: str, computed: str) -> Tower:
    """On the device, without the model's text half; InputError where it has no such k, or nothing to encode."""
    if model in RANDOM_MODELS:
        raise InputError(f"model is {model}: its tower knows nothing before it is trained; name a run, or a real model")
    verify_model(model)
    vlm = load_model(model, vocabulary=0)
    if not 1 <= k <= (most := features.most_tokens(vlm)) or math.isqrt(k) ** 2 != k:
        raise InputError(f"tokens_per_frame is {k}, expected a square number, at most the {most} of {model}")
    vlm.model.text_model = vlm.lm_head = None
    vlm.model.to(best_device())
    return Tower(vlm.eval(), model, k, keep, store, computed)


_kept_tower = functools.lru_cache(maxsize=1)(load_tower)


def _encode_all(
    tower: Tower, jobs: Sequence[_Job], source: PixelFrames, batch: int, show: Any = lambda done: None
) -> Generator[str | None]:
    """Write the jobs' files, in order; gives for each None, or why its frames can't be read."""
    done = 0
    with closing(_decoded(jobs, source, batch, tower.transfer.overlaps)) as decoded:
        for number, passes in groupby(decoded, key=itemgetter(0)):
            job, filled = jobs[number], 0
            values = np.empty((len(job.frames), tower.k, tower.width), tower.store)
            try:
                for block in tower.features(future.result() for _, future in passes):
                    values[filled : filled + len(block)] = block
                    filled += len(block)
                    show(done + filled)
            except InputError as error:
                for _, future in passes:
                    future.cancel()
                yield str(error)
                continue
            if not np.isfinite(values).all():
                problem = f"features that are no numbers, or too large for {tower.store}"
                raise InputError(f"video {job.clip.video_uid}: {problem}; use --store float32, or another --model")
            features.write_features(job.path, job.header, job.frames, values)
            done += filled
            yield None


def _encode_there(job: _Job, source: PixelFrames, batch: int) -> str | None:
    """One video, in another process that has one of its machine's cores to itself, and perhaps a GPU."""
    torch.set_num_threads(1)
    tower = _kept_tower(*(job.header[name] for name in ("model", "k", "layer", "stored", "computed")))
    if tower.fingerprint != job.header["fingerprint"]:
        raise InputError(f"{tower.model}: not the same on {os.uname().nodename}; give all machines the same model")
    return next(_encode_all(tower, [job], source, batch))


def _decoded(jobs: Sequence[_Job], source: PixelFrames, batch: int, pin: bool) -> Generator[tuple[int, Future[Tensor]]]:
    """(number of the job, pixels [n, 3, S, S]) of each pass; threads decode 2 * READERS passes ahead."""
    own = threading.local()  # each thread has its own files open

    def read(job: _Job, frames: npt.NDArray[np.int32]) -> Tensor:
        if not hasattr(own, "source"):
            own.source = PixelFrames(source.root, source.side, cache_bytes=0, open_files=1)
        runs = np.split(frames, np.flatnonzero(np.diff(frames) != 1) + 1)
        pixels = np.concatenate([own.source.load(job.clip, int(run[0]), int(run[-1]) + 1) for run in runs])
        return torch.from_numpy(pixels).pin_memory() if pin else torch.from_numpy(pixels)

    ahead: deque[tuple[int, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for number, job in enumerate(jobs):
                for frames in np.split(job.frames, range(batch, len(job.frames), batch)):
                    ahead.append((number, pool.submit(read, job, frames)))
                    if len(ahead) > 2 * READERS:
                        yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(cancel_futures=True)
