"""Runs the vision tower once over every frame that a data folder needs, so that training needs no pixels.

At 256M a frame's pass costs as much as 1,000 text tokens: seconds of a CPU core, and the same again in every
epoch. The features of a frozen tower never change; kept (features.py), they cost 24 KB a frame and one read.

Videos are done one by one, `batch` frames a pass, while threads decode what comes next. A file is written when
its video is complete: a run that is killed goes on where it was, and a second run over the same data does nothing.
bfloat16 is used only where a probe on the data's own frames stays within TOLERANCE of float32.

Many machines share the work in one of two ways. As parts (`part`): each run does the videos whose names hash to
it, and all write into one folder. Or by a `mapper` (pipeline/cluster.py: Ray), which is given a task per video.
Either way a video is encoded alone and in the same passes, so its file has the same bytes.

    n frames of a pass    k tokens per frame    D length of a feature    S side in pixels
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import SmolVLMForConditionalGeneration

from pipeline.dataset import ClipExample, Split, read_manifest
from pipeline.errors import InputError
from pipeline.media import images_in
from pipeline.storage import LOCK, lock, make_folder
from trainer import vision
from trainer.checkpoint import verify_model
from trainer.config import RANDOM_MODELS
from trainer.features import LAYERS, STORED, Features, Provenance, feature_path, open_features, write_features
from trainer.frame_source import PixelFrames, Pixels, open_frames
from trainer.model import load_model
from trainer.transfer import Transfer, pinned

DTYPES = ("auto", "float32", "bfloat16")
TOLERANCE = 2e-2  # of bfloat16: length of the difference over length of float32's vector, of the worst token
PROBED = 8  # frames, spread over the first video
READERS = min(16, os.cpu_count() or 1)  # threads that decode
_LOOK_S = 2.0  # for others that look at a lock, too
PROBED_VIDEOS = 20  # the first of them that can be read is probed
_LEFT = re.compile(r"\.(.+\.safetensors)\.[0-9a-f]{8}\.new")  # of a file that was being written

Mapper = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Generator[Any]]  # (function, calls) -> results


@dataclass
class EncodeReport:
    """What was done; `refused` says of each video that has no features what is wrong with it."""

    out: Path
    computed: str  # float32 or bfloat16
    probe: float | None = None  # bfloat16's error as TOLERANCE counts it; None: not measured
    videos: int = 0  # written now
    skipped: int = 0  # complete before
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0  # of reading, computing and writing
    refused: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Exit status: 0, or 3 where videos were refused."""
        return 3 if self.refused else 0

    def add(self, other: EncodeReport) -> None:
        """Count in what another process wrote."""
        self.videos += other.videos
        self.frames += other.frames
        self.bytes += other.bytes
        self.refused += other.refused


def encode(
    data: Path,
    out: Path,
    model: str,
    k: int = 1,
    frames_root: Path | None = None,
    dtype: str = "auto",
    store: str = "float16",
    batch: int = 32,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
    mapper: Mapper | None = None,
    keep: str = "vision",
) -> EncodeReport:
    """Write the features of all videos of all splits of `data` into the folder `out`, k tokens per frame.

    `model`: a folder, a hub name or a run of ours. `dtype`: auto, float32 or bfloat16, to compute in; `store`:
    float16 or float32. `keep`: "vision", the features before the connector, which can go on learning, or "connector",
    those after it: smaller (21 times at 256M), for training that freezes it. `progress`: a bar on stderr where that is
    a terminal. `part` (i, n): only the i-th of n shares of the videos, i from 1; runs of other parts may write into
    `out` at the same time. `mapper` runs the tower in other processes, a task per video; None: here. A video whose
    frames are missing, short or damaged is refused, the rest is done; InputError where nothing is left, or an option
    is wrong.
    """
    _check_options(k, dtype, store, batch, part, keep)
    videos = _videos(data, part)
    vlm = _load(model, k, keep)
    root = open_frames(read_manifest(data), frames_root, vision.side(vlm)).root
    source = PixelFrames(root, vision.side(vlm), cache_bytes=0)
    found, refused = _find(videos, source)
    if mapper is None or dtype == "float32":
        computed, probe = _choose(vlm, k, keep, dtype, found, source)
    else:
        ((computed, probe),) = mapper(_choose_there, [(model, k, keep, dtype, found[:PROBED_VIDEOS], source)])
    eye = _Eye(vlm, k, keep, store, computed, probe)
    report = EncodeReport(out, eye.computed, eye.probe, refused=refused)
    started = time.monotonic()
    with _alone(out, part):
        jobs = [job for job in (_plan(video, path, out, model, eye) for video, path in found) if job is not None]
        report.skipped = len(found) - len(jobs)
        _clear(out, jobs)
        total = sum(len(job.frames) for job in jobs)
        with _bar(total, progress) as tick:
            if mapper is None:
                _do(jobs, eye, source, batch, tick, report)
            else:
                how = _How(model, k, keep, store, eye.computed, eye.fingerprint, source, batch)
                _have_done(mapper, jobs, how, tick, report)
    report.seconds = time.monotonic() - started
    if report.refused and not report.videos and not report.skipped:
        raise InputError(f"{root}: none of {len(videos)} videos can be encoded; {report.refused[0]}")
    return report


def _check_options(k: int, dtype: str, store: str, batch: int, part: tuple[int, int], keep: str) -> None:
    if k < 1 or math.isqrt(k) ** 2 != k:
        raise InputError(f"tokens_per_frame is {k}, expected a square number: 1, 4, 9, ...")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if store not in STORED:
        raise InputError(f"store is {store!r}, expected one of {', '.join(STORED)}")
    if keep not in LAYERS:
        raise InputError(f"keep is {keep!r}, expected one of {', '.join(LAYERS)}")
    if batch < 1:
        raise InputError(f"batch is {batch}, expected above 0")
    if not 1 <= part[0] <= part[1]:
        raise InputError(f"part is {part[0]}/{part[1]}, expected 1/N to N/N; --part counts from 1 (--array=1-N)")


# ---- what is to be done ------------------------------------------------------------------------------


@dataclass
class _Video:
    clips: dict[tuple[str | None, str], ClipExample] = field(default_factory=dict)  # by frames_file and dataset
    ranges: list[tuple[int, int]] = field(default_factory=list)
    there: int = 0  # frames that its file has

    @property
    def frames(self) -> npt.NDArray[np.int32]:
        """What its clips need and its file has."""
        needed = np.unique(np.concatenate([np.arange(*ends, dtype=np.int32) for ends in self.ranges]))
        return needed[needed < self.there]

    @property
    def clip(self) -> ClipExample:
        return next(iter(self.clips.values()))


@dataclass(frozen=True)
class _Job:
    """A file to write."""

    path: Path
    about: Provenance
    clip: ClipExample  # one of the video's
    frames: npt.NDArray[np.int32]  # ascending


def _videos(data: Path, part: tuple[int, int]) -> list[_Video]:
    """Every video of every split that falls to the part, with the frames that its clips need."""
    found: dict[tuple[str, float], _Video] = {}
    for split in dict.fromkeys(s["split"] for s in read_manifest(data)["shards"] if s["clips"]):
        for clip in Split(data, split).in_order(rate=None):
            if _share(clip, part[1]) != part[0]:
                continue
            video = found.setdefault((clip.video_uid, clip.fps), _Video())
            names = (clip.frames_file, clip.dataset)
            if names not in video.clips:  # without what would keep its whole row group in memory
                video.clips[names] = replace(clip, turns=(), labels=np.zeros((2, 0), np.int8))
            video.ranges.append((clip.start_frame, clip.end_frame))
    return list(found.values())


def _share(clip: ClipExample, shares: int) -> int:
    """Which of 1..shares the clip's video falls to, by its name."""
    digest = hashlib.sha256(f"{clip.video_uid} {clip.fps:g}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % shares + 1


def _find(videos: Sequence[_Video], source: PixelFrames) -> tuple[list[tuple[_Video, Path]], list[str]]:
    """Videos with the file or folder of their frames, and what is wrong with the others, or lacks at the end."""
    found, refused = [], []
    for video in videos:
        name = f"video {video.clip.video_uid}"
        try:
            paths = {source.find(clip) for clip in video.clips.values()}
            video.there = source.count(video.clip)
        except InputError as error:
            refused.append(f"{name}: {error}")
            continue
        if len(paths) > 1:
            named = ", ".join(sorted(map(str, paths)))
            refused.append(f"{name}: its clips name several frames_files: {named}; keep one")
            continue
        needed = max(end for _, end in video.ranges)
        if needed > video.there:
            refused.append(
                f"{name}: {video.there} frames, but its clips need {needed}; those that are there are encoded"
            )
        if len(video.frames):
            found.append((video, paths.pop()))
    return found, refused


def _plan(video: _Video, path: Path, out: Path, model: str, eye: _Eye) -> _Job | None:
    """The job, or None where a complete file is there. Frames that a file of the same kind has stay in it."""
    clip, frames = video.clip, video.frames
    about = Provenance(
        clip.video_uid, clip.fps, path.name, _bytes(path), model, eye.revision, eye.fingerprint, eye.k, eye.side,
        eye.computed, eye.store, eye.keep,
    )  # fmt: skip
    target = feature_path(out, clip.video_uid, clip.fps)
    before = _frames_of_same(target, about)
    if before is not None and np.isin(frames, before).all():
        return None
    return _Job(target, about, clip, frames if before is None else np.union1d(frames, before))


def _clear(out: Path, jobs: Sequence[_Job]) -> None:
    """Remove what killed runs left of files that are now ours to write."""
    mine = {job.path for job in jobs}
    for path in out.rglob(".*"):
        left = _LEFT.fullmatch(path.name)
        if left and path.with_name(left[1]) in mine:
            path.unlink(missing_ok=True)


def _frames_of_same(path: Path, about: Provenance) -> npt.NDArray[np.int32] | None:
    """Frames of a file that is as good as `about`'s would be: computed in the same type, or in float32."""
    try:
        file = open_features(path)
    except InputError:
        return None
    if (layer := file.about.get("layer")) != about.layer:
        raise InputError(f"{path}: features of the layer {layer}, and kept; choose another --out, or --keep {layer}")
    if file.about.get("fingerprint") != about.fingerprint:
        raise InputError(
            f"{path}: made by another vision tower ({file.about.get('model')}), and kept; choose another --out"
        )
    asked, computed = about.header(), file.about.get("computed")
    told_alike = all(file.about.get(name) == asked[name] for name in asked.keys() - {"model", "revision", "computed"})
    return file.frames if told_alike and computed in (about.computed, "float32") and file.sound() else None


def _bytes(path: Path) -> int:
    """Size of a file, or of a folder's images; 0 where their names are wrong, which reading them will say."""
    if not path.is_dir():
        return path.stat().st_size
    try:
        return sum(image.stat().st_size for image in images_in(path))
    except ValueError:
        return 0


# ---- seeing ------------------------------------------------------------------------------------------


def _load(name: str, k: int, keep: str = "vision") -> SmolVLMForConditionalGeneration:
    """The model of that name without its text half, its tower and connector on the device."""
    if name in RANDOM_MODELS:
        raise InputError(f"model is {name}: its tower knows nothing before it is trained; name a run, or a real model")
    verify_model(name)
    vlm = load_model(name, vocabulary=0)
    if k > vision.most_tokens(vlm):
        raise InputError(f"tokens_per_frame is {k}, but {name} has {vision.most_tokens(vlm)}; lower --tokens-per-frame")
    if keep == "connector" and vision.width(vlm, keep) >= vision.width(vlm):
        raise InputError(
            f"keep is connector, but {name} has {vision.width(vlm, keep)} values after it and {vision.width(vlm)} "
            f"before; use --keep vision"
        )
    vlm.model.text_model = vlm.lm_head = None
    vlm.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return vlm.eval()


class _Eye:
    """The tower, and how it is used."""

    def __init__(
        self, vlm: SmolVLMForConditionalGeneration, k: int, keep: str, store: str, computed: str, probe: float | None
    ) -> None:
        self.vlm, self.k, self.keep, self.store, self.computed, self.probe = vlm, k, keep, store, computed, probe
        self.side, self.width = vision.side(vlm), vision.width(vlm, keep)
        self.fingerprint = vision.fingerprint(vlm, keep)
        self.revision = str(getattr(vlm.config, "_commit_hash", None) or "")
        self.transfer = Transfer(_device(vlm))

    def features(self, blocks: Iterator[Tensor], what: str) -> Iterator[Features]:
        """[n, k, D] of each block, a block late: a GPU is given the next one before the last one is fetched, and
        copies both ways while it computes."""
        before: Callable[[], Tensor] | None = None
        for block in blocks:
            [pixels] = self.transfer.up([block])()
            seen = _see(self.vlm, pixels, self.k, self.keep, self.computed)
            now = self.transfer.down(seen.to(getattr(torch, self.store)))
            if before is not None:
                yield self._checked(before(), what)
            before = now
        if before is not None:
            yield self._checked(before(), what)

    def _checked(self, features: Tensor, what: str) -> Features:
        fetched: Features = features.numpy()
        if not np.isfinite(fetched).all():
            mend = "use --store float32" if self.store == "float16" else "use another --model"
            raise InputError(f"{what}: features that are too large for {self.store}, or no numbers; {mend}")
        return fetched


def _device(vlm: SmolVLMForConditionalGeneration) -> torch.device:
    return next(vlm.model.vision_model.parameters()).device


def _see(vlm: SmolVLMForConditionalGeneration, pixels: Tensor, k: int, keep: str, computed: str) -> Tensor:
    """[n, k, D] of pixels [n, 3, S, S] on the device, there."""
    bf16 = computed == "bfloat16"
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        features = vision.look(vlm, pixels, k, chunk=len(pixels))
        return vision.project(vlm, features) if keep == "connector" else features


def _choose(
    vlm: SmolVLMForConditionalGeneration,
    k: int,
    keep: str,
    dtype: str,
    found: Sequence[tuple[_Video, Path]],
    source: PixelFrames,
) -> tuple[str, float | None]:
    """The type to compute in, and bfloat16's error where that was asked for or could be faster (on a GPU)."""
    if dtype == "float32" or (dtype == "auto" and _device(vlm).type != "cuda"):
        return "float32", None
    pixels = _sample(found, source)
    if pixels is None:
        return "float32", None
    error = bfloat16_error(vlm, pixels, k, keep)
    if error <= TOLERANCE:
        return "bfloat16", error
    if dtype == "bfloat16":
        raise InputError(
            f"dtype is bfloat16, but features differ from float32's by {error:.1%} of their length, "
            f"at most {TOLERANCE:.0%} is accepted; use --dtype float32"
        )
    return "float32", error


def bfloat16_error(vlm: SmolVLMForConditionalGeneration, pixels: Pixels, k: int, keep: str = "vision") -> float:
    """How far bfloat16 features of these frames [n, 3, S, S] are from float32's, as TOLERANCE counts it."""
    there = torch.from_numpy(pixels).to(_device(vlm))
    exact, rough = (_see(vlm, there, k, keep, computed).double() for computed in ("float32", "bfloat16"))
    return float(((rough - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def _sample(found: Sequence[tuple[_Video, Path]], source: PixelFrames) -> Pixels | None:
    """Some frames of the first video that can be read."""
    for video, _ in found:
        frames = video.frames
        chosen = frames[np.linspace(0, len(frames) - 1, min(PROBED, len(frames))).astype(int)]
        try:
            return _pixels(source, video.clip, chosen)
        except InputError:
            continue
    return None


# ---- doing it ----------------------------------------------------------------------------------------


def _do(
    jobs: Sequence[_Job],
    eye: _Eye,
    source: PixelFrames,
    batch: int,
    tick: Callable[[int], None],
    report: EncodeReport,
) -> None:
    with closing(_ahead(jobs, source, batch, pin=eye.transfer.overlaps)) as coming:
        for job, pixels in coming:
            _write(job, eye, pixels, tick, report)


@dataclass(frozen=True)
class _How:
    """What another process needs to do a job as this one would."""

    model: str
    k: int
    keep: str
    store: str
    computed: str
    fingerprint: str
    source: PixelFrames
    batch: int


def _have_done(
    mapper: Mapper, jobs: Sequence[_Job], how: _How, tick: Callable[[int], None], report: EncodeReport
) -> None:
    with closing(mapper(_do_there, [(how, report.out, job) for job in jobs])) as coming:
        for job, done in zip(jobs, coming, strict=True):
            report.add(done)
            tick(len(job.frames))


def _do_there(how: _How, out: Path, job: _Job) -> EncodeReport:
    """In another process: one video."""
    vlm = _kept(how.model, how.k, how.keep)
    eye = _Eye(vlm, how.k, how.keep, how.store, how.computed, None)
    if eye.fingerprint != how.fingerprint:
        raise InputError(f"model is {how.model}: another tower on {os.uname().nodename}; give all machines the same")
    report = EncodeReport(out, how.computed)
    _do([job], eye, how.source, how.batch, lambda done: None, report)
    return report


def _choose_there(
    model: str, k: int, keep: str, dtype: str, found: Sequence[tuple[_Video, Path]], source: PixelFrames
) -> tuple[str, float | None]:
    """In another process, whose device may be another."""
    return _choose(_kept(model, k, keep), k, keep, dtype, found, source)


@functools.lru_cache(maxsize=1)
def _kept(model: str, k: int, keep: str) -> SmolVLMForConditionalGeneration:
    """The model, loaded once by a process that has one of its machine's cores to itself, and perhaps a GPU."""
    torch.set_num_threads(1)
    return _load(model, k, keep)


class _Refused(Exception):
    """A video whose frames can't be read; its text is a InputError's."""


def _write(job: _Job, eye: _Eye, pixels: Iterator[Tensor], tick: Callable[[int], None], report: EncodeReport) -> None:
    def counted() -> Iterator[Features]:
        for features in eye.features(pixels, f"video {job.about.video_uid}"):
            tick(len(features))
            yield features

    try:
        size = write_features(job.path, job.about, job.frames, eye.width, counted())
    except _Refused as error:
        report.refused.append(f"video {job.about.video_uid}: {error}")
        return
    report.videos += 1
    report.frames += len(job.frames)
    report.bytes += size


def _passes(job: _Job, batch: int) -> list[npt.NDArray[np.int32]]:
    """The job's frames, `batch` at a time."""
    return np.split(job.frames, range(batch, len(job.frames), batch))


def _ahead(
    jobs: Sequence[_Job], source: PixelFrames, batch: int, pin: bool
) -> Generator[tuple[_Job, Iterator[Tensor]]]:
    """Each job with the pixels of its passes, which READERS threads decode 2 * READERS passes ahead; pinned, if `pin`.

    The pixels of a video raise _Refused where it can't be read on.
    """
    mine = threading.local()  # each thread has its own files open

    def read(clip: ClipExample, frames: npt.NDArray[np.int32]) -> Tensor:
        if not hasattr(mine, "source"):
            mine.source = PixelFrames(source.root, source.side, cache_bytes=0, open_files=1)
        pixels = torch.from_numpy(_pixels(mine.source, clip, frames))
        return pinned(pixels) if pin else pixels

    def pixels(job: _Job) -> Iterator[Tensor]:
        while ahead and ahead[0][0] is job:
            future = take()
            try:
                yield future.result()
            except InputError as error:
                raise _Refused(str(error)) from None

    def take() -> Future[Tensor]:
        ahead.extend(islice(started, 1))
        return ahead.popleft()[1]

    with ThreadPoolExecutor(READERS) as pool:
        started = ((job, pool.submit(read, job.clip, frames)) for job in jobs for frames in _passes(job, batch))
        ahead = deque(islice(started, 2 * READERS))
        try:
            for job in jobs:
                while ahead[0][0] is not job:  # what is left of one that was refused
                    take().cancel()
                yield job, pixels(job)
        finally:
            pool.shutdown(cancel_futures=True)


def _pixels(source: PixelFrames, clip: ClipExample, frames: npt.NDArray[np.int32]) -> Pixels:
    runs = np.split(frames, np.flatnonzero(np.diff(frames) != 1) + 1)
    return np.concatenate([source.load(clip, int(run[0]), int(run[-1]) + 1) for run in runs])


@contextmanager
def _alone(out: Path, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Holds the lock of the folder's part. Runs that share the videos otherwise are refused: they would meet."""
    number, parts = part
    wait = "is writing there; wait for it, or choose another --out"
    make_folder(out)
    with lock(out / f"{LOCK}-{number}-of-{parts}", InputError(f"{out}: another run of part {number}/{parts} {wait}")):
        for path in out.glob(f"{LOCK}-*"):
            if not path.name.endswith(f"-of-{parts}"):
                taken = InputError(f"{out}: a run of another number of parts ({path.name}) {wait}")
                with lock(path, taken, timeout=_LOOK_S):  # other runs look here, too, for a moment
                    pass
        yield


@contextmanager
def _bar(frames: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; gives the function that counts frames."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    stderr = Console(stderr=True)
    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not (shown and stderr.is_terminal)) as bar:
        task = bar.add_task("encode", total=frames)
        yield lambda done: bar.update(task, advance=done)
