"""Every label on disk against `reference.py`, an independent reading of DESIGN.md: 0 may differ.

Random hostile files per convention (event, window, lead-in, ProAssist, both schemas in one file) go through
the command; then each frame's two labels, each bound, count, order and turn is compared. About 3,000 clips
and 0.2 million frames in under a minute. Each rule also has a small example written by hand.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fields import Undecided, decide, problems, vote
from harness import REAL, differences, preprocess, quarantine, shards
from hostile import KINDS, ballot, clips, dump, file_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import read_files

from pipeline.dataset import read_manifest
from pipeline.schema import draws, sampling_seed

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not here")


# ---- small helpers -----------------------------------------------------------------------------------


def turn(role: str, start=None, end=None, time: float | None = None, **more) -> dict:
    content = [{"id": "S1", "transition": "start"}] if role == "DST_UPDATE" else "text"
    given = {"role": role, "content": content, "start_frame": start, "end_frame": end, "time": time} | more
    return {name: value for name, value in given.items() if value is not None}


def a_clip(*turns: dict, start: int | None = 10, end: int | None = 20, **more) -> dict:
    clip = {"video_uid": "v", "fps": 2, "dst": [{"id": "S1", "name": "one"}], "conversation": list(turns)}
    bounds = {"start_frame_idx": start, "end_frame_idx": end}
    return clip | {name: value for name, value in bounds.items() if value is not None} | more


def write(folder: Path, found: list, name: str = "train_training.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(found))
    return path


def run(folder: Path, found: list, *options: object, name: str = "train_training.json", status: int = 0):
    """Preprocess clips written as one file; the shards of its split, or None where no clip survives."""
    out = folder / "out"
    ran = preprocess(write(folder, found, name), "--out", out, "--workers", 1, *options)
    assert (ran.status, "Traceback" in ran.err) == (status, False), ran.err + ran.out
    return shards(out, name.split("_")[0]) if ran.status in (0, 3) else None


def ones(frames, head: str) -> list[int]:
    return frames.filter(frames[f"{head}_label"] == 1)["frame"].to_list()


def row(frames, head: str) -> str:
    """Labels as text: 1, 0, and . for not sampled."""
    return "".join({1: "1", 0: "0", -100: "."}[x] for x in frames[f"{head}_label"].to_list())


def heads(found, clip: int = 0) -> tuple[str, str]:
    return row(found.frames[clip], "speaking"), row(found.frames[clip], "dst_update")


# ---- the reference itself, by hand -------------------------------------------------------------------


def labelled(clip: dict, *, drawn: int = 2**32 - 1, positive: str = "span", convention: str | None = None):
    (reading,), _, _ = read_files([[clip]], positive=positive, convention=convention)
    labels = reading.labels([drawn] * (reading.end - reading.start), 0.5)
    return tuple("".join({1: "1", 0: "0", -100: "."}[x] for x in labels[head]) for head in labels)


def test_reference_span_and_the_other_head():
    clip = a_clip(turn("assistant", 12, 14), turn("DST_UPDATE", 13, 16), turn("user", 17, 19))
    assert labelled(clip) == ("..1100....", "..0111....")
    assert labelled(clip, drawn=0) == ("0011000000", "0001110000")


def test_reference_onset_leaves_the_rest_out():
    clip = a_clip(turn("assistant", 12, 15), turn("DST_UPDATE", 13, 16), turn("assistant", 14, 15))
    assert labelled(clip, positive="onset") == ("..1.1.....", "..01......")
    assert labelled(clip, positive="onset", drawn=0) == ("001.100000", "0001..0000")


def test_reference_onset_before_the_clip():
    assert labelled(a_clip(turn("assistant", 8, 13)), positive="onset", drawn=0) == ("...0000000", "0" * 10)


def test_reference_conventions():
    turns = turn("assistant", 12, 14), turn("DST_UPDATE", 14, 14)
    assert labelled(a_clip(*turns), convention="event") == ("..11......", "..00......")
    assert labelled(a_clip(*turns), convention="window") == ("..111......", "..001......")  # the clip's end, too
    assert labelled(a_clip(*turns), convention="lead-in") == ("...1......", "...1......")


def test_reference_proassist_speaks_at_the_last_frame():
    turns = [turn("assistant"), {"role": "frames", "start": 10, "end": 13}, turn("assistant"), turn("user")]
    clip = a_clip(*turns, start=None, end=None, dst=None)
    assert labelled(clip) == ("..1", "...")
    asked = a_clip(*turns[1:2], turn("system", content="Please summarize it."), turn("assistant"), dst=None)
    assert labelled(asked, drawn=0) == ("0" * 10, "." * 10)


def test_reference_draws_are_splitmix64():
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    gamma, seed = 0x9E3779B97F4A7C15, sampling_seed(7, "a clip")
    key = mix((seed + gamma) % 2**64)
    frames = [0, 1, 193, 2**31 - 2]
    expected = [mix((key + (f + 1) * gamma) % 2**64) >> 32 for f in frames]
    assert draws(seed, 0, np.array(frames)).tolist() == expected


# ---- random hostile files ----------------------------------------------------------------------------

OPTIONS = [  # positive, --neg-rate, --seed, file name, --pad-s, --bounds
    ("span", None, 0, "train_training.json", 0, "auto"),
    ("onset", None, 1, "train_training.json", 0, "auto"),
    ("span", 0.3, 2, "val_x.json", 0, "given"),
    ("onset", 0.0, 3, "test_x.json", 0, "auto"),
    ("span", 0.0, 4, "train_x.jsonl", 0, "turns"),
    ("onset", 1.0, 2**40, "train_x.jsonl", 0, "auto"),
    ("span", None, 6, "val_x.jsonl", 3, "auto"),
    ("onset", 0.7, 7, "train_x.json", 0, "auto"),
]


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("kind", KINDS)
def test_random_hostile_files_have_no_wrong_label(kind: str, options: int, tmp_path: Path):
    rng = random.Random(f"{kind} {options}")
    found = file_of(rng, kind, 70)
    assert check(tmp_path, rng, [found], *OPTIONS[options]) > 1000


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(KINDS), options=st.sampled_from(OPTIONS))
def test_small_hostile_files_have_no_wrong_label(rng, kind, options, tmp_path_factory):
    found = file_of(rng, kind, rng.randint(1, 4), bad=0.4)
    check(tmp_path_factory.mktemp("small"), rng, [found], *options)


def test_each_file_of_a_split_has_its_own_convention(tmp_path: Path):
    rng = random.Random("three files")
    kinds = ("window", "lead-in", "event", "proassist", "generated", "timed")
    files = [file_of(rng, kind, 30, base=1000 * i) for i, kind in enumerate(kinds)]
    files[2].append(files[0][0])  # a duplicate across files
    check(tmp_path, rng, files, "span", None, 5, "train_{}.json", 0, "auto")


def check(folder: Path, rng, files: list[list], positive: str, rate, seed: int, name: str, pad: float, widen) -> int:
    """Write, preprocess and compare files of one split; the number of frames compared."""
    paths, names = [], [name.format(i) for i in range(len(files))]
    for found, name in zip(files, names, strict=True):
        paths.append(folder / name)
        paths[-1].write_bytes(dump(rng, found))
    out, split = folder / "out", names[0].split("_")[0]
    options = ["--positive", positive, "--seed", seed, "--workers", 1]
    options += [] if rate is None else ["--neg-rate", rate]
    options += ["--pad-s", pad] if pad else []
    options += ["--bounds", widen] if widen != "auto" else []
    ran = preprocess(*paths, "--out", out, *options)
    assert "Traceback" not in ran.err, ran.err
    try:
        kept, refused, votes = read_files(files, positive=positive, pad_s=pad, bounds_option=widen)
    except Undecided:
        assert ran.status == 1, ran.err
        assert "--frame-convention" in ran.err
        return 0
    assert ran.status == (3 if refused and kept else 0 if kept else 1), (ran.err, refused, votes)
    check_quarantine(out if kept else None, refused, names)
    if not kept:
        return 0
    manifest = read_manifest(out)
    told = [h["text"] for h in manifest["hazards"] if h["name"] == "initial state contradicts the updates"]
    wrong_states = sum(vote.contradicted for vote in votes)
    assert [text.split()[0] for text in told] == [f"{wrong_states:,}"] * bool(wrong_states)
    widened = [source["bounds_widened"] for source in manifest["inputs"]]
    assert widened == [vote.widened for vote in votes], f"bounds of {widened} clips widened, not {votes}"
    found = shards(out, split)
    wrong, frames = differences(found, kept, split=split, positive=positive, seed=seed, rate=rate)
    assert not wrong, "\n".join(wrong[:10])
    return frames


def check_quarantine(out: Path | None, refused: list, names: list[str]) -> None:
    """Each refused clip has one line: its file, its position, and a turn and field that are wrong."""
    if out is None:
        return
    lines = quarantine(out)
    assert [(Path(q["file"]).name, q["clip"]) for q in lines] == [(names[r.file], r.index) for r in refused]
    for line, refusal in zip(lines, refused, strict=True):
        fits = [line["turn"] == t and named(line["field"], f) for t, f in refusal.problems]
        assert any(fits), (line, refusal)


def named(field: str | None, expected: str) -> bool:
    return expected == "" or (field is not None and expected in field)


# ---- real files --------------------------------------------------------------------------------------


@needs_real
def test_real_clip_has_its_frames_in_place(tmp_path: Path):
    out = tmp_path / "out"
    ran = preprocess(REAL / "prospect_clip.json", "--out", out, "--split", "train", "--neg-rate", 1)
    assert ran.status == 0, ran.err
    found = shards(out)
    (clip,), (frames,) = found.clips, found.frames
    assert (clip["start_frame"], clip["end_frame"], clip["num_frames"]) == (193, 451, 258)
    assert frames["frame"].to_list() == list(range(193, 451))
    speaking = [193, 194, 212, 213, 224, 225, 260, 261, 303, 304, 369, 370, 394, 395, 423, 424]
    updates = [193, 194, 212, 213, 303, 304, 369, 370, 394, 395, 423, 424, 449, 450]
    assert ones(frames, "speaking") == speaking
    assert ones(frames, "dst_update") == updates
    assert (clip["n_speaking"], clip["n_dst_update"], clip["n_supervised"]) == (16, 14, 258)
    assert clip["frame_convention"] == "event"
    assert clip["recording_id"] == "nusar-2021_action_both_9011-c03f_9011_user_id_2021-02-01_160239"
    assert [s["id"] for s in clip["steps"]] == ["S1", "S2", "S3", "S4", "S5", "S6"]
    assert len(clip["turns"]) == 22


@needs_real
def test_real_proassist_conversations_speak_at_the_last_frame_before_the_turn(tmp_path: Path):
    out = tmp_path / "out"
    ran = preprocess(REAL / "proassist_prepared.jsonl", "--out", out, "--split", "val")
    assert ran.status == 0, ran.err
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
    assert len({c["clip_id"] for c in found.clips}) == 3
    assert len({c["recording_id"] for c in found.clips}) == 1


@needs_real
@pytest.mark.parametrize("positive", ["span", "onset"])
@pytest.mark.parametrize("file", ["prospect_clip.json", "proassist_prepared.jsonl"])
def test_real_files_have_no_wrong_label(file: str, positive: str, tmp_path: Path):
    text = (REAL / file).read_text()
    found = [json.loads(text)] if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    out = tmp_path / "out"
    ran = preprocess(REAL / file, "--out", out, "--split", "train", "--positive", positive, "--seed", 9)
    assert ran.status == 0, ran.err
    kept, refused, _ = read_files([found], positive=positive)
    assert not refused
    wrong, frames = differences(shards(out), kept, split="train", positive=positive, seed=9, rate=None)
    assert not wrong, "\n".join(wrong)
    assert frames == (258 if len(found) == 1 else 1007)


# ---- rules one by one --------------------------------------------------------------------------------


@pytest.mark.parametrize(("convention", "end"), [("event", 15), ("window", 16), ("lead-in", 15)])
def test_inferred_end_is_half_open(convention: str, end: int, tmp_path: Path):
    turns = [turn("assistant", 12, 13), turn("user", 13, 15)]
    found = run(tmp_path, [a_clip(*turns, start=None, end=None)], "--frame-convention", convention)
    assert (found.clips[0]["start_frame"], found.clips[0]["end_frame"]) == (12, end)


def voters(fitting: int, others: int) -> list[dict]:
    """Turns of which `fitting` obey `event` alone and `others` nothing."""
    good = [turn("user", 10 + i, 13 + i, (11.5 + i) / 2) for i in range(fitting)]
    return good + [turn("user", 50, 60, 1.0) for _ in range(others)]


@pytest.mark.parametrize(("fitting", "others"), [(9, 1), (18, 2), (27, 3), (0, 4), (1, 3)])
def test_nine_in_ten_is_enough_and_under_five_is_event(fitting: int, others: int, tmp_path: Path):
    found = run(tmp_path, [a_clip(*voters(fitting, others), end=100)])
    assert found.clips[0]["frame_convention"] == "event"


@pytest.mark.parametrize(("fitting", "others"), [(8, 1), (17, 2), (0, 5), (4, 1)])
def test_below_nine_in_ten_is_an_error_that_shows_the_votes(fitting: int, others: int, tmp_path: Path):
    path = write(tmp_path, [a_clip(*voters(fitting, others), end=100)])
    ran = preprocess(path, "--out", tmp_path / "out")
    assert ran.status == 1, ran.out + ran.err
    assert "--frame-convention" in ran.err
    assert str(fitting) in ran.err
    assert str(fitting + others) in ran.err
    assert len(ran.lines) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("seed", range(16))
def test_random_ballots_are_counted_alike(seed: int, tmp_path: Path):
    """Files whose votes lie near 90%: the same winner, or the same refusal."""
    found = ballot(random.Random(seed))
    path = write(tmp_path, found)
    ran = preprocess(path, "--out", tmp_path / "out", "--workers", 1)
    try:
        _, _, (file,) = read_files([found])
    except Undecided:
        assert ran.status == 1, ran.out
        assert "--frame-convention" in ran.err
        return
    assert ran.status == 0, ran.err
    assert {clip["frame_convention"] for clip in shards(tmp_path / "out").clips} == {file.convention}


def test_lead_in_is_asked_before_event(tmp_path: Path):
    """Ranges that end at floor + 1 contain their time as well: both rules fit, the first wins."""
    ends = [13, 13, 15, 18, 18]
    starts = [10, *ends[:-1]]
    turns = [turn("assistant", s, e, (e - 1) / 2) for s, e in zip(starts, ends, strict=True)]
    for clip, convention in ((a_clip(*turns), "lead-in"), (a_clip(*turns, start=9), "event")):
        n, votes = vote([clip])
        assert n == 5
        assert votes["lead-in"] == (5 if convention == "lead-in" else 4)
    found = run(tmp_path, [a_clip(*turns, end=30)], "--neg-rate", 1)
    assert found.clips[0]["frame_convention"] == "lead-in"
    assert ones(found.frames[0], "speaking") == [12, 14, 17]


def test_floor_has_a_tolerance(tmp_path: Path):
    """0.29 * 100 is 28.999999999999996: without a tolerance frame 29's windows would not fit."""
    turns = [turn("user", 27, 29, 0.29) for _ in range(6)]
    found = run(tmp_path, [a_clip(*turns, start=20, end=40, fps=100)])
    assert found.clips[0]["frame_convention"] == "window"


def test_untimed_and_system_turns_have_no_vote(tmp_path: Path):
    odd = [turn("user", 50, 60), turn("system", 0, 1, 40.0), turn("user", None, None, 3.0)] * 5
    found = run(tmp_path, [a_clip(*voters(9, 1), *odd, end=100)])
    assert found.clips[0]["frame_convention"] == "event"


def test_malformed_clips_have_no_vote(tmp_path: Path):
    bad = a_clip(*voters(0, 20), turn("robot"), id="bad", end=100)
    found = run(tmp_path, [a_clip(*voters(5, 0), id="good", end=100), bad], status=3)
    assert [c["clip_id"] for c in found.clips] == ["good"]


def test_votes_are_taken_before_cutting(tmp_path: Path):
    found = run(tmp_path, [a_clip(*voters(9, 1), start=200, end=210)])
    assert found.clips[0]["frame_convention"] == "event"
    assert found.clips[0]["n_speaking"] == 0


# ---- rates, seeds, workers ---------------------------------------------------------------------------


@pytest.mark.parametrize("positive", ["span", "onset"])
def test_a_lower_rates_negatives_are_a_subset(positive: str, tmp_path: Path):
    content = clips(random.Random("nested"), "event", 25)
    zeros, positives = [], []
    for rate in (0, 0.01, 0.3, 0.7, 1):
        found = run(tmp_path / str(rate), content, "--neg-rate", rate, "--positive", positive)
        assert {c["neg_rate"] for c in found.clips} == {rate}
        silent = [
            {(h, n) for h in ("speaking", "dst_update") for n in f.filter(f[f"{h}_label"] == 0)["frame"]}
            for f in found.frames
        ]
        zeros.append(silent)
        positives.append([ones(f, h) for f in found.frames for h in ("speaking", "dst_update")])
    assert all(p == positives[0] for p in positives)
    for lower, higher in pairwise(zeros):
        assert all(a <= b for a, b in zip(lower, higher, strict=True))
    assert sum(map(len, zeros[2])) < sum(map(len, zeros[3])) < sum(map(len, zeros[4]))


@pytest.mark.parametrize(
    ("name", "own", "option", "rate"),
    [
        ("train_x.json", None, None, 0.5),
        ("train_x.json", 0.2, None, 0.2),
        ("train_x.json", 0.2, "0.9", 0.9),
        ("train_x.json", 0.2, "train=0.8,val=1", 0.8),
        ("train_x.json", 0.2, "val=1", 0.2),
        ("val_x.json", 0.2, None, 1.0),
        ("val_x.json", 0.2, "train=0.8", 1.0),
        ("val_x.json", 0.2, "val=0.25", 0.25),
        ("test_x.json", 0.2, "0.25", 0.25),
    ],
)
def test_which_rate_holds(name: str, own, option, rate: float, tmp_path: Path):
    more = {} if own is None else {"neg_frame_sampling_rate": own}
    options = [] if option is None else ["--neg-rate", option]
    found = run(tmp_path, [a_clip(turn("assistant", 12, 15), **more)], *options, name=name)
    assert found.clips[0]["neg_rate"] == rate


# ---- padding -----------------------------------------------------------------------------------------


def test_reference_refuses_what_it_should_and_nothing_else():
    assert not problems(a_clip(turn("assistant", 12.0, 14.0), quality=float("nan"), fps=29.97))
    assert decide(4, {"lead-in": 0, "event": 0, "window": 0}) == "event"
    with pytest.raises(Undecided):
        decide(5, {"lead-in": 4, "event": 4, "window": 4})
