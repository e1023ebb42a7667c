"""The loaders that are compared, one per process: `python sides.py SIDE SHARDS STORE`.

    ours          this package's labels and turns, without texts, in a torch DataLoader
    hf            datasets, streaming from Parquet with lists, shuffle(1024), numpy format, torch DataLoader
    mds           MosaicML Streaming, arrays, shuffled (its default, py1e), torch DataLoader
    litdata       litdata, arrays, shuffled, its StreamingDataLoader
    NAME-bare     the same without a DataLoader; the peers' samples one string of bytes each, cut by hand: what someone
                  would write who had measured
    ours-texts    pipeline.dataset.Split.epoch, bare: whole clips, every turn an object with its text (no peer does it)
    floor         samples that lie in memory, permuted, redrawn: what the batches alone cost
    write-SIDE    makes a peer's copy of SHARDS in STORE

All deliver the same: shuffled epochs of batches of 16 clips, labels int8 [16, 2, longest] padded with -100, redrawn for
the epoch, and turns int32 [T, 3], as torch tensors, made by the same `Collate`. Two epochs are timed. In a third every
clip must come once, and clips, frames, turns, positives and supervised frames, counted over the tensors, must be what
was generated and, where that does not say, the same for all sides.

Peers hand out the stored labels and are redrawn by our function, 16 clips at a time: the cheapest place to do it.

Unfair to ours: opening hashes every shard, and the first epoch proves that the stored labels are the draw's; no peer
checks its files. The peers' stores hold labels, turns and what the draw needs, uncompressed in MDS and litdata; ours
are the shards as they are, zstd, texts beside. Unfair to them: all three can stream from object stores and share a
dataset between ranks, which costs even where unused. HF shuffles within its buffer, ours within a window of 1,024
clips, MDS and litdata within blocks or chunks: none is a global shuffle. One core, so background threads gain nothing.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH = 16
EPOCHS, CHECKED = (1, 2), 3  # timed, counted; epoch 0's labels are the stored ones: these are redrawn
SHARD = 2048  # clips of a Parquet file, as ours
GROUP = 256  # clips of a row group, as ours
LOOK = 8  # batches between two looks at the memory, in the counted epoch
BUFFER = 1024  # clips that HF shuffles among; our window holds as many
NOT_SAMPLED = -100
HEADS = ("speaking", "dst_update")
TURNS = ("role", "start", "end")


class Sample(NamedTuple):
    """One clip, from whichever loader. The names are the columns of every store."""

    clip: int
    start_frame: int
    sampling_seed: int  # its 64 bits as an int64: litdata knows no other integer
    neg_rate: float
    labels: np.ndarray  # int8 [2, F]
    turns: np.ndarray  # int32 [T, 3]


Batches = Iterable[dict[str, Any]]  # of torch tensors, see Collate
Epochs = Callable[[int], Batches]  # number of the epoch -> its batches


# --- batches --------------------------------------------------------------------------------------------


class Collate:
    """Samples -> torch tensors: labels int8 [B, 2, longest], frames int64 [B], turns int32 [T, 3], clip int64 [B].

    `epoch`: redraw the labels for it; None: they come redrawn.
    """

    def __init__(self, sample: Callable[[Any], Sample] = lambda sample: sample) -> None:
        self.epoch: int | None = None
        self.sample = sample  # from what the loader gives

    def __call__(self, given: Sequence[Any]) -> dict[str, Any]:
        import torch

        samples = [self.sample(one) for one in given]
        drawn = [s.labels for s in samples] if self.epoch is None else redrawn(samples, self.epoch)
        frames = [own.shape[1] for own in drawn]
        labels = np.full((len(samples), 2, max(frames)), NOT_SAMPLED, np.int8)
        for row, own, n in zip(labels, drawn, frames, strict=True):
            row[:, :n] = own
        return {
            "labels": torch.from_numpy(labels),
            "frames": torch.tensor(frames),
            "turns": torch.from_numpy(np.concatenate([s.turns for s in samples])),
            "clip": torch.tensor([s.clip for s in samples]),
        }


def redrawn(samples: list[Sample], epoch: int) -> list[np.ndarray]:
    """The labels of each, by our function. The data is `span` and has steps throughout."""
    from pipeline.labels import LabelRule, epoch_labels

    sizes = np.array([s.labels.shape[1] for s in samples])
    rule = LabelRule(
        starts=np.array([s.start_frame for s in samples]),
        sizes=sizes,
        seeds=np.array([s.sampling_seed for s in samples]).view(np.uint64),
        rates=np.array([s.neg_rate for s in samples]),
        tracked=np.ones(len(samples), bool),
        positives=np.concatenate([s.labels for s in samples], axis=1) == 1,
        onset_rest=None,
        unlabelled=None,
    )
    labels, end = epoch_labels(rule, epoch), np.cumsum(sizes)
    return [labels[:, b - n : b] for b, n in zip(end.tolist(), sizes.tolist(), strict=True)]


def bare(samples: Iterable[Any], collate: Collate) -> Batches:
    """Batches without a DataLoader."""
    samples = (sample for sample in samples)  # litdata's own iterator starts again once it has ended
    while batch := list(islice(samples, BATCH)):
        yield collate(batch)


def loaded(dataset: Any, collate: Collate) -> Batches:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=BATCH, collate_fn=collate)


# --- ours -----------------------------------------------------------------------------------------------


def label_stream(split: Any, epoch: int) -> Iterator[Sample]:
    """An epoch's clips in shuffled order as numbers alone: no text is read."""
    from trainer.sampler import order

    for number in order(0, epoch, split.sizes).tolist():
        group, row = split.find(number)
        turns = group.turns[group.turn_at[row] : group.turn_at[row + 1]]
        labels = group.labels(epoch)[:, group.frame_at[row] : group.frame_at[row + 1]].copy()
        yield Sample(number, int(group.rule.starts[row]), 0, 0.0, labels, turns)


def ours(shards: Path, _: Path) -> Epochs:
    from torch.utils.data import IterableDataset

    from pipeline.dataset import Split

    class Clips(IterableDataset):
        def __init__(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Any]:
            return label_stream(split, self.epoch)

    split = Split(shards, "train")
    return lambda epoch: loaded(Clips(epoch), Collate())


def ours_bare(shards: Path, _: Path) -> Epochs:
    from pipeline.dataset import Split

    split = Split(shards, "train")
    return lambda epoch: bare(label_stream(split, epoch), Collate())


def ours_texts(shards: Path, _: Path) -> Epochs:
    from pipeline.dataset import Split
    from trainer.sampler import order

    def sample(clip: Any) -> Sample:
        turns = [(len(t.text), t.start_frame or 0, t.end_frame or 0) for t in clip.turns]
        return Sample(clip.clip, clip.start_frame, 0, 0.0, clip.labels, np.array(turns, np.int32))

    split = Split(shards, "train")
    clips = lambda epoch: (split.clip(n, epoch) for n in order(0, epoch, split.sizes).tolist())  # noqa: E731
    return lambda epoch: bare(clips(epoch), Collate(sample))


# --- the peers ------------------------------------------------------------------------------------------

HEADER = struct.Struct("<iiqdi")  # the numbers of a Sample, then the bytes of its turns


def pack(s: Sample) -> bytes:
    numbers = HEADER.pack(s.clip, s.start_frame, s.sampling_seed, s.neg_rate, s.turns.nbytes)
    return numbers + s.turns.tobytes() + s.labels.tobytes()


def unpack(row: dict[str, Any]) -> Sample:
    *numbers, size = HEADER.unpack_from(row["sample"])
    rest = memoryview(row["sample"])[HEADER.size :]
    turns, labels = np.frombuffer(rest[:size], np.int32), np.frombuffer(rest[size:], np.int8)
    return Sample(*numbers, labels.reshape(2, -1), turns.reshape(-1, 3))


def from_row(row: dict[str, Any]) -> Sample:
    return Sample(**row)


def from_lists(row: dict[str, Any]) -> Sample:
    numbers = (row[name] for name in Sample._fields[:4])
    turns = np.stack([row[name] for name in TURNS], axis=1)
    return Sample(*numbers, np.stack([row[head] for head in HEADS]), turns)


def hf_stream(store: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, store.glob("*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return data.shuffle(seed=0, buffer_size=BUFFER)


def numbered(dataset: Any, collate: Collate, batches: Batches | None = None) -> Epochs:
    """The epochs of a peer; `batches`: its DataLoader, None: bare."""

    def epoch(number: int) -> Batches:
        collate.epoch = number
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)
        return bare(dataset, collate) if batches is None else batches

    return epoch


def hf(_: Path, store: Path) -> Epochs:
    data, collate = hf_stream(store).with_format("numpy"), Collate(from_lists)
    return numbered(data, collate, loaded(data, collate))


def hf_bare(_: Path, store: Path) -> Epochs:
    return numbered(hf_stream(store), Collate(unpack))


def mds_stream(store: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(store), shuffle=True, shuffle_seed=0, batch_size=BATCH)


def mds(_: Path, store: Path) -> Epochs:
    data, collate = mds_stream(store), Collate(from_row)
    return numbered(data, collate, loaded(data, collate))


def mds_bare(_: Path, store: Path) -> Epochs:
    return numbered(mds_stream(store), Collate(unpack))


def litdata(_: Path, store: Path) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset

    data, collate = StreamingDataset(str(store), shuffle=True, seed=0, drop_last=False), Collate(from_row)
    return numbered(data, collate, StreamingDataLoader(data, batch_size=BATCH, collate_fn=collate))


def litdata_bare(_: Path, store: Path) -> Epochs:
    from litdata import StreamingDataset

    return numbered(StreamingDataset(str(store), shuffle=True, seed=0, drop_last=False), Collate(unpack))


def floor(shards: Path, _: Path) -> Epochs:
    samples, collate = stored(shards), Collate()

    def epoch(number: int) -> Batches:
        collate.epoch = number
        order = np.random.default_rng(number).permutation(len(samples)).tolist()
        return bare((samples[i] for i in order), collate)

    return epoch


# --- writing what they read -----------------------------------------------------------------------------


def stored(shards: Path) -> list[Sample]:
    """All clips with the labels of epoch 0, in the order of their numbers."""
    from pipeline.dataset import Split

    split = Split(shards, "train")
    turns = {sample.clip: sample.turns for sample in label_stream(split, 0)}
    return [
        Sample(c.clip, c.start_frame, signed(c.sampling_seed), c.neg_rate, c.labels, turns[c.clip])
        for c in split.in_order(rate=None)
    ]


def signed(seed: int) -> int:
    return int(np.array(seed, np.uint64).view(np.int64))


def packed(sample: Sample) -> dict[str, Any]:
    return {"sample": pack(sample)}


def as_lists(sample: Sample) -> dict[str, Any]:
    columns = dict(zip(TURNS, sample.turns.T, strict=True)) | dict(zip(HEADS, sample.labels, strict=True))
    return {name: getattr(sample, name) for name in Sample._fields[:4]} | columns


def write_parquet(samples: list[Sample], out: Path, row: Callable[[Sample], dict[str, Any]], types: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part, first in enumerate(range(0, len(samples), SHARD)):
        table = pa.Table.from_pylist([row(s) for s in samples[first : first + SHARD]], pa.schema(types))
        pq.write_table(table, out / f"part-{part:05d}.parquet", row_group_size=GROUP, compression="zstd")


def write_hf(samples: list[Sample], out: Path) -> None:
    import pyarrow as pa

    numbers = [*zip(Sample._fields, (pa.int32(), pa.int32(), pa.int64(), pa.float64()), strict=False)]
    lists = [*((name, pa.list_(pa.int32())) for name in TURNS), *((name, pa.list_(pa.int8())) for name in HEADS)]
    write_parquet(samples, out, as_lists, [*numbers, *lists])


def write_hf_bare(samples: list[Sample], out: Path) -> None:
    import pyarrow as pa

    write_parquet(samples, out, packed, [("sample", pa.binary())])


def write_mds(samples: list[Sample], out: Path, row: Callable[[Sample], Any] = Sample._asdict) -> None:
    from streaming import MDSWriter

    numbers = {"clip": "int", "start_frame": "int", "sampling_seed": "int", "neg_rate": "float64"}
    columns = numbers | {"labels": "ndarray:int8", "turns": "ndarray:int32"}
    with MDSWriter(out=str(out), columns=columns if row is Sample._asdict else {"sample": "bytes"}) as writer:
        for sample in samples:
            writer.write(row(sample))


def write_litdata(samples: list[Sample], out: Path, row: Callable[[Sample], Any] = Sample._asdict) -> None:
    """By the writer inside `litdata.optimize`, without its worker processes."""
    from litdata.streaming.cache import Cache

    cache = Cache(str(out), chunk_bytes="64MB")
    for i, sample in enumerate(samples):
        cache[i] = row(sample)
    cache.done()
    cache.merge()


# --- one process ----------------------------------------------------------------------------------------


def drained(batches: Batches) -> int:
    """How many clips an epoch holds."""
    return sum(len(batch["clip"]) for batch in batches)


def counted(batches: Batches) -> tuple[dict[str, int], float]:
    """(everything an epoch holds, counted over its tensors; the most MB of private memory on the way).

    Raises ValueError where a clip comes twice or never.
    """
    found = dict.fromkeys(("clips", "frames", "turns", "speaking", "dst_update", "supervised"), 0)
    clips: list[int] = []
    most = 0.0
    for number, batch in enumerate(batches):
        most = max(most, private_mb()) if number % LOOK == 0 else most
        positives = (batch["labels"] == 1).sum(dim=(0, 2))
        found["frames"] += int(batch["frames"].sum())
        found["turns"] += len(batch["turns"])
        found["speaking"] += int(positives[0])
        found["dst_update"] += int(positives[1])
        found["supervised"] += int((batch["labels"] >= 0).sum())
        clips += batch["clip"].tolist()
    if sorted(clips) != list(range(len(clips))):
        raise ValueError("an epoch must bring every clip once")
    if clips[:BATCH] == list(range(BATCH)):
        raise ValueError("not shuffled")
    return found | {"clips": len(clips)}, most


class Phases:
    """[wall, CPU, asleep] seconds per named step; asleep: what the side spent in time.sleep on the main thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.asleep, self._sleep = 0.0, time.sleep
        time.sleep = self.sleep
        self.last = self.now()

    def sleep(self, seconds: float) -> None:
        import threading

        if threading.current_thread() is threading.main_thread():
            self.asleep += seconds
        self._sleep(seconds)

    def now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), self.asleep

    def done(self, name: str) -> None:
        now = self.now()
        self.seconds[name] = [round(new - old, 4) for new, old in zip(now, self.last, strict=True)]
        self.last = self.now()


def private_mb() -> float:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


SIDES: dict[str, tuple[str, Callable[[Path, Path], Epochs]]] = {  # side -> (what it imports, how it is opened)
    "ours": ("pipeline.dataset", ours),
    "hf": ("datasets", hf),
    "mds": ("streaming", mds),
    "litdata": ("litdata", litdata),
    "ours-bare": ("pipeline.dataset", ours_bare),
    "hf-bare": ("datasets", hf_bare),
    "mds-bare": ("streaming", mds_bare),
    "litdata-bare": ("litdata", litdata_bare),
    "ours-texts": ("pipeline.dataset", ours_texts),
    "floor": ("pipeline.dataset", floor),
}
WRITERS: dict[str, Callable[[list[Sample], Path], None]] = {
    "hf": write_hf,
    "mds": write_mds,
    "litdata": write_litdata,
    "hf-bare": write_hf_bare,
    "mds-bare": lambda samples, out: write_mds(samples, out, packed),
    "litdata-bare": lambda samples, out: write_litdata(samples, out, packed),
}


def load(side: str, shards: Path, store: Path, phases: Phases) -> dict[str, Any]:
    import importlib

    import torch

    torch.set_num_threads(1)
    imported, opener = SIDES[side]
    importlib.import_module(imported)
    before = private_mb()
    phases.done("import")
    epochs = opener(shards, store)
    phases.done("open")
    clips = []
    for number in EPOCHS:
        clips.append(drained(epochs(number)))
        phases.done(f"epoch {number}")
    found, most = counted(epochs(CHECKED))
    phases.done("counted")
    if set(clips) != {found["clips"]}:
        raise ValueError(f"{clips} clips in the timed epochs, {found['clips']} in the counted one")
    return {"found": found, "imports_mb": before, "streaming_mb": most}


def write(side: str, shards: Path, store: Path, phases: Phases) -> dict[str, Any]:
    samples = stored(shards)
    phases.done("read")
    store.mkdir(parents=True)
    WRITERS[side](samples, store)
    phases.done("write")
    return {}


def main() -> None:
    phases = Phases()
    side, shards, store = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    task, name = (write, side.removeprefix("write-")) if side.startswith("write-") else (load, side)
    report = task(name, shards, store, phases)
    print(json.dumps({"phases": phases.seconds, **report}), flush=True)


if __name__ == "__main__":
    main()
