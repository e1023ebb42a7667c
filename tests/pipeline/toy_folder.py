"""Finished output folders of three hand-labelled clips, and what is printed of them.

Labels are written as strings: `1` positive, `0` supervised silence, `.` not sampled.
"""

import json
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.schema import CLIPS, FRAMES, SCHEMA_HASH, SCHEMA_VERSION, shard_path
from pipeline.storage import sha256

LABEL = {"1": 1, "0": 0, ".": -100}
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \x1b[2J \u202e {{POLICY}}"


def labels(text):
    return np.array([LABEL[c] for c in text], np.int8)


def turn(role, text, start=None, end=None, time=None, updates=()):
    updates = [{"id": i, "transition": t} for i, t in updates]
    frames = {"start_frame": start, "end_frame": end}
    return {"role": role, "text": text, **frames, "time_s": time, "updates": updates}


def make_clip(clip_id, speaking, dst, start=0, fps=2.0, recording="rec-1", turns=(), steps=(), **more):
    s, d = labels(speaking), labels(dst)
    row = {"clip_id": clip_id, "clip": 0, "video_uid": f"video of {clip_id}", "recording_id": recording}
    row |= {"dataset": "made", "clip_idx": 0, "fps": fps, "goal": "Build a <toy>", "initial_state": []}
    row |= {"start_frame": start, "end_frame": start + len(s), "num_frames": len(s), "turns": list(turns)}
    row |= {"steps": [{"id": i, "name": n} for i, n in steps], "sampling_seed": 1, "neg_rate": 0.5}
    row |= {"positive": "span", "frame_convention": "event", "n_speaking": int((s == 1).sum())}
    row |= {"n_dst_update": int((d == 1).sum()), "n_supervised": int(((s != -100) | (d != -100)).sum())}
    return row | more, s, d


def write_folder(folder, splits, parts=1, **manifest):
    """A finished output folder of `splits`: name -> clips of make_clip, dealt out to `parts` shards."""
    shards = []
    for split, clips in splits.items():
        for number, (row, _, _) in enumerate(clips):
            row["clip"] = number
        for part, chosen in enumerate(np.array_split(np.arange(len(clips)), parts)):
            some = [clips[i] for i in chosen]
            for table, rows in (("clips", clips_table(some)), ("frames", frames_table(some))):
                path = folder / (name := shard_path(table, split, part))
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(rows, path)
                entry = {"split": split, "part": part, "clips": len(some), "table": table, "path": name}
                shards.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
    schema = {"schema_version": SCHEMA_VERSION, "schema_hash": SCHEMA_HASH}
    counts = {split: counts_of(clips) for split, clips in splits.items()}
    manifest = {**schema, "shards": shards, "splits": counts, "hazards": []} | manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def counts_of(clips):
    """What the manifest says of a split; gaps are left to the caller."""
    s, d = (np.concatenate([clip[1 + head] for clip in clips]) for head in (0, 1))
    tracked = [clip for clip in clips if clip[0]["steps"]]
    counts = {
        "clips": len(clips),
        "recordings": len({row["recording_id"] for row, _, _ in clips}),
        "frames": len(s),
        "hours": sum(len(s) / row["fps"] for row, s, _ in clips) / 3600,
        "supervised": int(((s != -100) | (d != -100)).sum()),
        "both_positive": int(((s == 1) & (d == 1)).sum()),
        "first_frame_positive": sum(1 in (s[0], d[0]) for _, s, d in clips),
        "neg_rates": sorted({row["neg_rate"] for row, _, _ in clips}),
        "drops": {},
    }
    for name, of_head, own in (("speaking", s, clips), ("dst_update", d, tracked)):
        counts |= {f"{name}_positive": int((of_head == 1).sum()), f"{name}_supervised": int((of_head != -100).sum())}
        counts |= {f"{name}_clips": len(own), f"{name}_frames": sum(len(clip[1]) for clip in own)}
        counts[f"{name}_gaps"] = [[2.0, 1]]
    return counts


def clips_table(clips):
    return pa.Table.from_pylist([row for row, _, _ in clips], schema=CLIPS)


def frames_table(clips):
    pieces = []
    for row, s, d in clips:
        frames = np.arange(row["start_frame"], row["end_frame"], dtype=np.int32)
        columns = [[row["clip_id"]] * len(s), [row["clip"]] * len(s), frames, frames / row["fps"], s, d]
        pieces.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, FRAMES, strict=True)], schema=FRAMES))
    return pa.concat_tables(pieces)


def toy_splits():
    talk = [
        turn("system", "You help."),
        turn("user", "I want to build it.", 193, 195, 96.5),
        turn("DST_UPDATE", "S1->start", 193, 194, 96.5, [("S1", "start")]),
        turn("assistant", "Great, take the base.", 193, 195, 96.7),
        turn("DST_UPDATE", "S1->complete, S2->start", 200, 201, 100.2, [("S1", "complete"), ("S2", "start")]),
        turn("assistant", HOSTILE, 199, 201, 99.9),
        turn("assistant", "Too late.", 300, 302, 150.1),
    ]
    steps = [("S1", "base"), ("S2", "wheels"), ("S3", "cabin")]
    return {
        "train": [
            make_clip("toy_a#0", "11..0011.0", "10..0001.0", start=193, turns=talk, steps=steps),
            make_clip("toy_b#1", "0.01100.", "........", recording="rec-2"),
        ],
        "val": [make_clip("toy_c#0", "000100", "110000", start=5, fps=4.0, neg_rate=1.0, steps=steps)],
    }


def text_of(renderable, width=100, **console):
    file = StringIO()
    Console(file=file, width=width, color_system=None, **console).print(renderable)
    return file.getvalue()
