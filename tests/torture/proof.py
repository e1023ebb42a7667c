"""Can the attacks find anything? Each is let loose on a product that was broken on purpose: `run --prove`.

A sabotage is a function that is run in every attacked process before its command; it takes out one thing that the
product relies on. Its attack must report a loss within some attempts, or it is no attack.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .arena import Arena
from .attacks import LOST

TRIES = 80


def shards_in_place() -> None:
    """preprocess writes over the old output, the manifest first."""
    from pipeline import output as shards

    def commit(staged: Path, out: Path, manifest: dict[str, Any]) -> None:
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                target = out / path.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                time.sleep(0.02)

    import pipeline.preprocess

    shards.commit = pipeline.preprocess.commit = commit


def checkpoints_in_place() -> None:
    """A checkpoint is copied over the old one, file by file."""
    from trainer import checkpoint

    def copy(new: Path, folder: Path) -> None:
        for path in sorted(new.iterdir()):
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.name)
            time.sleep(0.02)
        shutil.rmtree(new)

    checkpoint._move_into_place = copy  # type: ignore[assignment]


def optimizer_forgotten() -> None:
    """A resumed run starts with fresh moments."""
    import trainer.train

    trainer.train.load_state = lambda folder, model, optimizer: None


def no_hashes_of_shards() -> None:
    """Nor is anything else of them looked at, and what Arrow raises goes through."""
    from pipeline import dataset as shards

    shards.verify_shard = lambda data, shard: data / shard["path"]  # type: ignore[assignment]
    shards._check_rows = lambda where, first_clip: None
    shards._unreadable = lambda path, error: error  # type: ignore[assignment, return-value]
    shards._Group.check_draw = lambda self: None  # type: ignore[method-assign]


def no_hashes_of_checkpoints() -> None:
    from trainer import checkpoint

    checkpoint._verify = lambda folder, files, to_train: None


def no_checksums_of_features() -> None:
    from trainer.features import FeatureFile

    FeatureFile.rows = lambda self, first, end: self._features[first : min(end, len(self.frames))].numpy()  # type: ignore[method-assign]


def inspect_trusts() -> None:
    """inspect looks at no hash and no list."""
    from pipeline import output as shards

    shards.verify = shards.read_manifest


def nameless_errors() -> None:
    """An error of a full disk names nothing."""
    import pipeline.storage
    import trainer.checkpoint
    import trainer.train

    @contextlib.contextmanager
    def naming(path: Path, new: Path | None = None) -> Iterator[None]:
        yield

    for module in (pipeline.storage, trainer.checkpoint, trainer.train):
        module.naming = naming  # type: ignore[attr-defined]


def any_picture() -> None:
    """What a decoder raises is not caught."""
    from trainer import frame_source as frames

    frames.UNDECODABLE = (KeyError,)  # type: ignore[assignment]


def any_size() -> None:
    """Pictures of any size are decoded."""
    from PIL import Image

    from pipeline import video

    Image.MAX_IMAGE_PIXELS = None
    video.MAX_PIXELS = 1 << 40  # type: ignore[misc]


def trusting_numbers() -> None:
    """A frame number is whatever int() takes."""
    from pipeline.readers import clip, prospect

    clip.whole = prospect.whole = lambda value, name, turn=None, least=0: int(value)
    prospect.whole_or_none = clip.whole_or_none = lambda value, *_, **__: None if value is None else int(value)


def trusting_rows() -> None:
    """The trainer takes the rows of a shard as they are."""
    from pipeline import dataset as shards

    shards._check_rows = lambda where, first_clip: None


def no_locks() -> None:
    import fcntl

    fcntl.flock = lambda handle, how: None


def needs_home() -> None:
    import trainer.cli

    before = trainer.cli.main
    trainer.cli.main = lambda argv=None: before(argv) if os.environ["HOME"] else 1


def survivors() -> None:
    """A process is left behind."""
    if not os.fork():
        time.sleep(60)
        os._exit(0)


PROOFS: Sequence[tuple[str, Callable[[], None]]] = (
    ("kill", shards_in_place),
    ("kill", checkpoints_in_place),
    ("kill", optimizer_forgotten),
    ("corrupt", no_hashes_of_shards),
    ("corrupt", no_hashes_of_checkpoints),
    ("corrupt", no_checksums_of_features),
    ("reorder", inspect_trusts),
    ("disk", nameless_errors),
    ("disk", shards_in_place),
    ("frames", any_picture),
    ("frames", any_size),
    ("examples", trusting_numbers),
    ("forge", trusting_rows),
    ("twice", no_locks),
    ("odd", needs_home),
    ("odd", survivors),
)


def prove(arena: Arena, only: Sequence[str]) -> int:
    """Try every pair; 1 if a sabotage was not found."""
    from .run import attempt

    missed = 0
    for name, sabotage in PROOFS:
        if only and name not in only:
            continue
        arena.sabotage, found = sabotage, None
        for seed in range(TRIES):
            verdict = attempt(arena, name, seed)
            if verdict.outcome == LOST and not verdict.what.startswith("the attack itself"):
                found = f"found at attempt {seed + 1}: {verdict.what}: {verdict.why}"
                break
        missed += found is None
        print(f"{name:9} {sabotage.__name__:25} {(found or f'NOT FOUND in {TRIES} attempts')[:170]}", flush=True)
    arena.sabotage = lambda: None
    return int(missed > 0)
