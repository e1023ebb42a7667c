"""Every label on disk against `reference.py`, an independent reading of DESIGN.md: 0 may differ.

Random files of each convention and schema go through the command; then each frame's two labels, each bound, count,
order and turn is compared. The reference itself is held against small examples written by hand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from harness import REAL, differences, preprocess, quarantine, shards
from random_clips import KINDS, clips, dump
from reference import Undecided, read_files

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not here")


def turn(role: str, start=None, end=None, time: float | None = None, **more) -> dict:
    content = [{"id": "S1", "transition": "start"}] if role == "DST_UPDATE" else "text"
    given = {"role": role, "content": content, "start_frame": start, "end_frame": end, "time": time} | more
    return {name: value for name, value in given.items() if value is not None}


def a_clip(*turns: dict, start: int | None = 10, end: int | None = 20, **more) -> dict:
    clip = {"video_uid": "v", "fps": 2, "dst": [{"id": "S1", "name": "one"}], "conversation": list(turns)}
    bounds = {"start_frame_idx": start, "end_frame_idx": end}
    return clip | {name: value for name, value in bounds.items() if value is not None} | more


def run(folder: Path, found: list, *options: object):
    """Status and shards of clips written as one file."""
    folder.mkdir(exist_ok=True)
    (folder / "train_x.json").write_text(json.dumps(found))
    ran = preprocess(folder / "train_x.json", "--out", folder / "out", *options)
    return ran, shards(folder / "out")


def ones(frames, head: str) -> list[int]:
    return frames.filter(frames[f"{head}_label"] == 1)["frame"].to_list()


# ---- the reference itself, by hand -------------------------------------------------------------------

TWO = turn("assistant", 12, 14), turn("DST_UPDATE", 13, 16), turn("user", 17, 19)
THREE = turn("assistant", 12, 15), turn("DST_UPDATE", 13, 16), turn("assistant", 14, 15)
EMPTY = turn("assistant", 12, 14), turn("DST_UPDATE", 14, 14)
MARKS = {"role": "frames", "start": 10, "end": 13}
PRO = a_clip(turn("assistant"), MARKS, turn("assistant"), turn("user"), start=None, end=None, dst=None)
ASKED = a_clip(MARKS, turn("system", content="Please summarize it."), turn("assistant"), dst=None)
NEVER, ALWAYS = 2**32 - 1, 0  # draws


@pytest.mark.parametrize(
    ("clip", "positive", "convention", "drawn", "speaking", "dst_update"),
    [
        (a_clip(*TWO), "span", None, NEVER, "..1100....", "..0111...."),
        (a_clip(*TWO), "span", None, ALWAYS, "0011000000", "0001110000"),
        (a_clip(*THREE), "onset", None, NEVER, "..1.1.....", "..01......"),
        (a_clip(*THREE), "onset", None, ALWAYS, "001.100000", "0001..0000"),
        (a_clip(turn("assistant", 8, 13)), "onset", None, ALWAYS, "...0000000", "0000000000"),
        (a_clip(*EMPTY), "span", "event", NEVER, "..11......", "..00......"),
        (a_clip(*EMPTY), "span", "window", NEVER, "..111......", "..001......"),  # the clip's end, too
        (a_clip(*EMPTY), "span", "lead-in", NEVER, "...1......", "...1......"),
        (PRO, "span", None, NEVER, "..1", "..."),  # at the last frame before the turn
        (ASKED, "span", None, ALWAYS, "0000000000", ".........."),
    ],
)
def test_the_reference_labels_small_clips_as_by_hand(clip, positive, convention, drawn, speaking, dst_update):
    (reading,), _ = read_files([[clip]], positive=positive, convention=convention)
    labels = reading.labels([drawn] * (reading.end - reading.start), 0.5)
    written = {head: "".join({1: "1", 0: "0", -100: "."}[x] for x in row) for head, row in labels.items()}
    assert written == {"speaking": speaking, "dst_update": dst_update}


# ---- random files ------------------------------------------------------------------------------------

OPTIONS = [  # positive, --neg-rate, --seed, file name, --pad-s, --bounds
    ("span", None, 0, "train_training.json", 0, "auto"),
    ("onset", None, 2**40, "train_x.jsonl", 0, "auto"),
    ("span", 0.3, 2, "val_x.json", 0, "given"),
    ("onset", 0.0, 3, "test_x.json", 0, "auto"),
    ("span", 0.7, 4, "train_x.jsonl", 0, "turns"),
    ("span", None, 6, "val_x.jsonl", 3, "auto"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_random_files_have_no_wrong_label(kind: str, tmp_path: Path):
    for number, options in enumerate(OPTIONS):
        rng = random.Random(f"{kind} {number}")
        (tmp_path / str(number)).mkdir()
        check(tmp_path / str(number), rng, [clips(rng, kind, 25)], *options)


def test_each_file_of_a_split_has_its_own_convention(tmp_path: Path):
    rng = random.Random("files")
    kinds = ("window", "lead-in", "event", "proassist", "generated", "timed")
    files = [clips(rng, kind, 20, base=1000 * i) for i, kind in enumerate(kinds)]
    check(tmp_path, rng, files, "span", None, 5, "train_{}.json", 0, "auto")


def check(folder: Path, rng, files: list[list], positive: str, rate, seed: int, name: str, pad: float, widen) -> None:
    """Write and preprocess files of one split; compare shards and quarantine with the reference."""
    paths = [folder / name.format(i) for i in range(len(files))]
    for found, path in zip(files, paths, strict=True):
        path.write_bytes(dump(rng, found))
    out, split = folder / "out", name.split("_")[0]
    options = ["--positive", positive, "--seed", seed, "--pad-s", pad, "--bounds", widen]
    ran = preprocess(*paths, "--out", out, *options, *([] if rate is None else ["--neg-rate", f"{split}={rate}"]))
    try:
        kept, refused = read_files(files, positive=positive, pad_s=pad, widen=widen)
    except Undecided:
        assert ran.status == 1, ran.err
        assert "--frame-convention" in ran.err
        return
    assert ran.status == (3 if refused else 0), (ran.err, refused)
    assert [(Path(q["file"]), q["clip"]) for q in quarantine(out)] == [(paths[file], index) for file, index in refused]
    wrong = differences(shards(out, split), kept, split=split, positive=positive, seed=seed, rate=rate)
    assert not wrong, "\n".join(wrong[:10])


# ---- real files --------------------------------------------------------------------------------------


@needs_real
def test_the_real_clip_has_its_frames_in_place(tmp_path: Path):
    _, found = run(tmp_path, [json.loads((REAL / "prospect_clip.json").read_text())], "--neg-rate", 1)
    (clip,), (frames,) = found.clips, found.frames
    assert frames["frame"].to_list() == list(range(193, 451))
    speaking = [193, 194, 212, 213, 224, 225, 260, 261, 303, 304, 369, 370, 394, 395, 423, 424]
    updates = [193, 194, 212, 213, 303, 304, 369, 370, 394, 395, 423, 424, 449, 450]
    assert (ones(frames, "speaking"), ones(frames, "dst_update")) == (speaking, updates)
    assert (clip["n_speaking"], clip["n_dst_update"], clip["n_supervised"]) == (16, 14, 258)
    assert clip["frame_convention"] == "event"
    assert clip["recording_id"] == "nusar-2021_action_both_9011-c03f_9011_user_id_2021-02-01_160239"


@needs_real
def test_real_proassist_conversations_speak_at_the_last_frame_before_the_turn(tmp_path: Path):
    out = tmp_path / "out"
    assert preprocess(REAL / "proassist_prepared.jsonl", "--out", out, "--split", "val").status == 0
    found = shards(out, "val")
    assert [(c["start_frame"], c["end_frame"]) for c in found.clips] == [(11, 342), (11, 349), (11, 349)]
    more = [230, 232, 233, 245, 282, 286, 304, 323, 341, 345, 348]
    by_hand = [
        [15, 20, 40, 69, 87, 119, 140, 161, 168, 180, 197, 230, 231, 233, 245, 265, 282, 303, 321, 341],
        [15, 20, 40, 69, 88, 119, 140, 161, 169, 180, 197, 231, 234, 245, 265, 282, 311, 329, 341, 348],
        [15, 20, 40, 69, 88, 119, 141, 161, 168, 181, 197, *more],
    ]
    assert [ones(frames, "speaking") for frames in found.frames] == by_hand
    assert all(set(frames["dst_update_label"]) == {-100} for frames in found.frames)
    assert all(set(frames["speaking_label"]) == {0, 1} for frames in found.frames)


@needs_real
@pytest.mark.parametrize("positive", ["span", "onset"])
@pytest.mark.parametrize("file", ["prospect_clip.json", "proassist_prepared.jsonl"])
def test_real_files_have_no_wrong_label(file: str, positive: str, tmp_path: Path):
    text = (REAL / file).read_text()
    found = [json.loads(text)] if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    options = ("--split", "train", "--positive", positive, "--seed", 9)
    assert preprocess(REAL / file, "--out", tmp_path / "out", *options).status == 0
    kept, refused = read_files([found], positive=positive)
    assert not refused
    assert not differences(shards(tmp_path / "out"), kept, positive=positive, seed=9)


# ---- the vote ----------------------------------------------------------------------------------------


def voters(fitting: int, others: int) -> list[dict]:
    """Turns of which `fitting` obey `event` alone and `others` nothing."""
    good = [turn("user", 10 + i, 13 + i, (11.5 + i) / 2) for i in range(fitting)]
    return good + [turn("user", 50, 60, 1.0) for _ in range(others)]


NO_VOTE = [turn("user", 50, 60), turn("system", 0, 1, 40.0), turn("user", None, None, 3.0)] * 5
BOTH = [turn("assistant", s, e, (e - 1) / 2) for s, e in zip([10, 13, 13, 15, 18], [13, 13, 15, 18, 18], strict=True)]
BALLOTS = [
    *((a_clip(*voters(*counts), end=100), "event") for counts in ((9, 1), (18, 2), (0, 4), (1, 3))),
    *((a_clip(*voters(*counts), end=100), counts) for counts in ((8, 1), (17, 2), (0, 5))),
    (a_clip(*voters(9, 1), *NO_VOTE, end=100), "event"),
    (a_clip(*voters(9, 1), start=200, end=210), "event"),  # the vote is taken before cutting
    (a_clip(*BOTH, end=30), "lead-in"),  # a range that ends at floor + 1 contains its time as well: the first rule wins
    # 0.29 * 100 is 28.999999999999996: without a tolerance frame 29's windows would not fit
    (a_clip(*[turn("user", 27, 29, 0.29)] * 6, start=20, end=40, fps=100), "window"),
]


@pytest.mark.parametrize(("clip", "result"), BALLOTS)
def test_nine_in_ten_of_a_files_turns_decide_its_convention(clip: dict, result, tmp_path: Path):
    """result: the convention, or where none is decided the numbers of fitting and other turns."""
    malformed = a_clip(*voters(0, 20), turn("robot"), id="bad", end=100)  # has no vote
    ran, found = run(tmp_path, [clip, malformed])
    if isinstance(result, str):
        assert [row["frame_convention"] for row in found.clips] == [result]
        return
    assert (ran.status, len(ran.lines), found.clips) == (1, 1, [])
    assert "--frame-convention" in ran.err
    assert f"of its {sum(result)} timed turns" in ran.err
