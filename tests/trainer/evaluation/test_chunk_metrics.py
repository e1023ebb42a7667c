"""EgoProactive's metrics: the official scorer's numbers, from scored clips and from submissions."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, turn, write_shards
from scored import clip_of

from pipeline.errors import InputError
from trainer.cli import main
from trainer.evaluation.chunk_metrics import (
    Session,
    answers_of,
    chunk_rates,
    match_clips,
    read_sessions,
    read_submission,
    report_chunks,
    report_clips,
    write_submission,
)

# Three made-up sessions. At 2 fps the chunks of aa01 are frames 0..3, 21..36, 37..52, 85..100, 152..167, 168..183,
# those of aa02 0..15, 16..31, 32..46 and those of aa03 1..16, 17..32.
SESSIONS = [
    {
        "video_path": "aa01.mp4",
        "video_intervals": [[0.0, 2.0], [10.4, 18.4], [18.4, 26.4], [42.4, 50.4], [75.9, 83.9], [83.9, 91.9]],
        "query": "How do I pot a cactus?",
        "task": "Potting a cactus",
        "answers": ["$interrupt$Gravel first.", "$interrupt$ Now soil.", "$silent$", "$silent$", "$interrupt$Press.",
                    "$silent$"],
    },
    {
        "video_path": "aa02.mp4",
        "video_intervals": [[0.0, 8.0], [8.0, 16.0], [16.0, 23.5]],
        "query": "Help me fix the tyre.",
        "task": "Patching a tyre",
        "answers": ["$interrupt$Lever it off.", "$silent$", "$silent$"],
    },
    {
        "video_path": "aa03.mp4",
        "video_intervals": [[0.25, 8.25], [8.25, 16.25]],
        "query": "Tee aufgießen",
        "task": "Making [b]tea",
        "answers": ["$interrupt$Wasser kochen.", "$interrupt$Jetzt aufgießen."],
    },
]  # fmt: skip
INTERRUPTS = {"aa01": ((0, 4), (21, 37), (152, 168)), "aa02": ((0, 16),), "aa03": ((1, 17), (17, 33))}
FRAMES = {"aa01": 184, "aa02": 47, "aa03": 33}
REFRACTORY_S = 1.0


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sessions(tmp_path):
    return read_sessions(write_lines(tmp_path / "sessions.jsonl", SESSIONS))


def turns_of(uid):
    query = next(s["query"] for s in SESSIONS if s["video_path"] == f"{uid}.mp4")
    return [turn("user", query), *(turn("assistant", "!", start, end) for start, end in INTERRUPTS[uid])]


def scored(uid, speaking=None, said=None):
    """The clip of a session: high scores at the frames `speaking`, or live, with the texts `said` by frame."""
    scores = None if speaking is None else [float(i in speaking) for i in range(FRAMES[uid])]
    clip = clip_of(turns_of(uid), frames=FRAMES[uid], name=uid, recording=uid, speaking=scores or [0.0] * FRAMES[uid])
    if said is not None:
        clip = replace(clip, said=[said.get(i) for i in range(FRAMES[uid])])
    return clip


@pytest.mark.parametrize(
    ("counts", "rates"),
    [
        ((7, 3, 5, 3), [0.7, 0.625, 0.6625, 0.6614]),  # the scorer's own hand cases
        ((9, 1, 1, 1), [0.9, 0.5, 0.7, 0.6708]),
        ((10, 0, 0, 0), [1.0, 0.0, 0.5, 0.0]),  # undefined is 0
        ((0, 5, 0, 5), [0.0, 0.0, 0.0, 0.0]),
        ((0, 0, 0, 0), [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_rates_by_hand(counts, rates):
    found = chunk_rates(counts)
    assert [round(float(found[f"{name}_f1"]), 4) for name in ("interrupt", "silent", "macro", "gmean")] == rates


def test_counts_are_pooled_and_also_given_by_task(sessions):
    predicted = [
        ["$interrupt$", "$silent$", "$silent$", "$interrupt$", "$interrupt$", "$silent$"],  # tp 2, fn 1, tn 2, fp 1
        ["$interrupt$", "$silent$", "$silent$"],  # tp 1, tn 2
        ["$interrupt$", "sorry"],  # tp 1, fn 1
    ]
    report = report_chunks(sessions, predicted)
    overall = report["overall"]
    assert [overall[name] for name in ("tp", "fp", "tn", "fn", "support")] == [4, 1, 4, 2, 11]
    assert [overall[f"interrupt_{name}"] for name in ("precision", "recall", "f1")] == [0.8, 0.6667, 0.7273]
    assert [overall[f"silent_{name}"] for name in ("precision", "recall", "f1")] == [0.6667, 0.8, 0.7273]
    assert (overall["macro_f1"], overall["gmean_f1"]) == (0.7273, 0.7273)
    by_task = report["per_task"]
    assert [by_task[task]["support"] for task in sorted(by_task)] == [2, 3, 6]
    assert (by_task["Making [b]tea"]["interrupt_f1"], by_task["Making [b]tea"]["macro_f1"]) == (0.6667, 0.3333)
    assert (report["total_sessions"], report["skipped_chunks"]) == (3, 0)


def test_intervals_hold_the_value_and_need_two_recordings(sessions):
    predicted = [["$interrupt$"] * 6, ["$interrupt$", "$silent$", "$silent$"], ["$interrupt$", "$silent$"]]
    report = report_chunks(sessions, predicted)
    assert len(report["overall"]["intervals"]) == 8
    for name, (low, high) in report["overall"]["intervals"].items():
        assert 0 <= low <= report["overall"][name] <= high <= 1
        assert low < high
    assert set(report["per_task"]["Making [b]tea"]["intervals"].values()) == {None}
    together = report_chunks(sessions, predicted, ["take 1", "take 1", "take 1"])["overall"]
    assert (together["recordings"], together["intervals"]["macro_f1"]) == (1, None)


def official(gold, predicted):
    """The published scorer's arithmetic, written anew, one chunk at a time."""

    def metrics(c):
        def f1(hits, alarms, misses):
            p = hits / (hits + alarms) if hits + alarms else 0.0
            r = hits / (hits + misses) if hits + misses else 0.0
            return p, r, 2 * p * r / (p + r) if p + r else 0.0

        one, other = f1(c["tp"], c["fp"], c["fn"]), f1(c["tn"], c["fn"], c["fp"])
        found = {"macro_f1": (one[2] + other[2]) / 2, "gmean_f1": math.sqrt(one[2] * other[2])}
        for name, values in (("interrupt", one), ("silent", other)):
            found |= dict(zip((f"{name}_precision", f"{name}_recall", f"{name}_f1"), values, strict=True))
        return {name: round(value, 4) for name, value in found.items()} | c | {"support": sum(c.values())}

    tasks, skipped = {}, 0
    for session, line in zip(gold, predicted, strict=True):
        counts = tasks.setdefault(session["task"], dict.fromkeys(("tp", "fp", "tn", "fn"), 0))
        skipped += abs(len(session["answers"]) - len(line["answers"]))
        for truth, guess in zip(session["answers"], line["answers"], strict=False):
            truth, guess = (text.lstrip().startswith("$interrupt$") for text in (truth, guess))
            counts["tp" if truth and guess else "fp" if guess else "fn" if truth else "tn"] += 1
    total = {name: sum(c[name] for c in tasks.values()) for name in ("tp", "fp", "tn", "fn")}
    return metrics(total), {task: metrics(c) for task, c in tasks.items()}, skipped


def test_random_submissions_get_the_official_numbers():
    rng = random.Random(0)
    texts = ["$silent$", "$interrupt$", "$interrupt$x", " $interrupt$ y", "\n$silent$", "", "no", "a $interrupt$"]
    for _ in range(200):
        gold = [
            {"video_path": f"{i}.mp4", "task": rng.choice("ABC"), "answers": rng.choices(texts, k=rng.randrange(6))}
            for i in range(rng.randrange(1, 5))
        ]
        guess = [{"answers": rng.choices(texts, k=max(0, len(s["answers"]) - rng.randrange(2)))} for s in gold]
        sessions = [Session(s["video_path"], s["task"], answers=tuple(s["answers"])) for s in gold]
        report = report_chunks(sessions, [line["answers"] for line in guess], draws=0)
        overall, per_task, skipped = official(gold, guess)
        assert {name: report["overall"][name] for name in overall} == overall
        assert {t: {name: found[name] for name in overall} for t, found in report["per_task"].items()} == per_task
        assert report["skipped_chunks"] == skipped


@pytest.mark.parametrize(
    ("frames", "interrupts"),
    [
        ((), "......"),
        ((3,), "I....."),
        ((4, 20), "......"),  # between chunks
        ((21,), ".I...."),
        ((37,), "..I..."),
        ((183,), ".....I"),
        ((36, 37), ".I...."),  # 37 falls to the refractory time
        ((36, 38), ".II..."),
    ],
)
def test_an_event_belongs_to_the_chunk_whose_frames_hold_it(sessions, frames, interrupts):
    given = answers_of(sessions[0], scored("aa01", set(frames)), 0.5, REFRACTORY_S)
    assert "".join("I" if answer == "$interrupt$" else "." for answer in given) == interrupts


def test_a_free_running_clip_answers_with_what_it_said(sessions):
    clip = scored("aa01", said={0: "Gravel.", 10: "nobody asked", 21: "Soil.", 30: " And more. ", 60: "?", 152: ""})
    expected = ["$interrupt$Gravel.", "$interrupt$Soil. And more.", "$silent$", "$silent$", "$interrupt$", "$silent$"]
    assert answers_of(sessions[0], clip, None, REFRACTORY_S) == expected


def test_chunks_after_the_clip_s_end_have_no_answer(sessions):
    clip = clip_of(turns_of("aa01"), frames=100, name="aa01", recording="aa01", speaking=[0.0] * 100)
    report, answers = report_clips(sessions[:1], [clip], 0.5, REFRACTORY_S)
    assert (answers, report["skipped_chunks"], report["overall"]["support"]) == ([["$silent$"] * 4], 2, 4)


def test_speaking_at_the_interrupts_alone_is_perfect(sessions):
    """Clips in another order, and one that no session asks for."""
    clips = [scored(uid, {start for start, _ in INTERRUPTS[uid]}) for uid in ("aa03", "aa02", "aa01")]
    other = clip_of([], name="zz", recording="zz", speaking=[1.0] * 120)
    report, _ = report_clips(sessions, [*clips, other], 0.5, REFRACTORY_S)
    overall = report["overall"]
    assert [overall[name] for name in ("tp", "fp", "tn", "fn")] == [6, 0, 5, 0]
    assert (overall["macro_f1"], overall["gmean_f1"], overall["recordings"]) == (1.0, 1.0, 3)
    assert overall["intervals"]["macro_f1"] == [1.0, 1.0]


def test_without_a_threshold_only_live_clips_are_counted(sessions):
    assert report_clips(sessions[:1], [scored("aa01")], None, REFRACTORY_S) == (None, [])
    report, _ = report_clips(sessions[:1], [scored("aa01", said={0: "x"})], None, REFRACTORY_S)
    assert report["overall"]["tp"] == 1


def test_sessions_of_one_video_find_their_clips(tmp_path):
    """Told apart by their interrupts, else by their order."""
    second = {**SESSIONS[1], "answers": ["$silent$", "$interrupt$x", "$silent$"]}
    sessions = read_sessions(write_lines(tmp_path / "s.jsonl", [SESSIONS[1], second, SESSIONS[1]]))
    starts = [16, 0, 0]
    clips = [
        clip_example([turn("assistant", "!", at, at + 16)], 0, 47, clip_id=f"c{i}", clip=i, video="aa02", rate=1.0)
        for i, at in enumerate(starts)
    ]
    assert [clip.clip_id for clip in match_clips(sessions, clips[::-1])] == ["c1", "c0", "c2"]


def test_a_session_without_its_clip_is_named(sessions):
    with pytest.raises(
        InputError, match=r"sessions.jsonl line 2 \(aa02.mp4\): the split has no clip of video 'aa02'; "
    ):
        match_clips(sessions, [scored("aa01").clip, scored("aa03").clip])
    silent = clip_example([], 0, 47, clip_id="aa02", video="aa02", rate=1.0)
    with pytest.raises(InputError, match="aa02' whose speaking labels are its interrupt chunks"):
        match_clips(sessions, [scored("aa01").clip, silent, scored("aa03").clip])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {**SESSIONS[1], "answers": "$silent$"},
            "line 2: Expected `array`, got `str` - at `$.answers`; expected a",
        ),
        ({"video_intervals": [[0, 8], [8, None]]}, "Expected `float`, got `null` - at `$.video_intervals[1][1]`"),
        ({"video_path": "v.mp4", "video_intervals": [[8, 0]]}, "line 2 (v.mp4): video_intervals holds [8.0, 0.0], exp"),
        ([1], "s.jsonl line 2: Expected `object`, got `array`; expected a JSON object"),
    ],
)
def test_what_is_no_session_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_sessions(write_lines(tmp_path / "s.jsonl", [SESSIONS[0], line]))


def test_sessions_that_cannot_be_read_or_matched_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        read_sessions(tmp_path / "none.jsonl")
    sessions = read_sessions(write_lines(tmp_path / "s.jsonl", [{**SESSIONS[1], "answers": ["$silent$"]}]))
    with pytest.raises(InputError, match="3 video_intervals, 1 answers, expected one of each per chunk"):
        match_clips(sessions, [scored("aa02").clip])


def test_a_submission_is_read_back_as_written(tmp_path, sessions):
    predicted = [["$silent$"] * 6, ["$interrupt$\u2028 über\n"], []]
    write_submission(tmp_path / "out" / "p.jsonl", sessions, predicted)
    rows = [json.loads(line) for line in (tmp_path / "out" / "p.jsonl").read_text().splitlines()]
    assert rows[1] == {"video_path": "aa02.mp4", "answers": ["$interrupt$\u2028 über\n"]}
    assert read_submission(tmp_path / "out" / "p.jsonl", sessions) == [tuple(p) for p in predicted]


def test_a_submission_has_a_line_for_each_session_in_order(tmp_path, sessions):
    lines = [{"video_path": s["video_path"], "answers": []} for s in SESSIONS]
    with pytest.raises(InputError, match="2 lines, expected one for each of the 3 sessions, in order"):
        read_submission(write_lines(tmp_path / "p.jsonl", lines[:2]), sessions)
    with pytest.raises(InputError, match=r"line 1 .*: video_path is 'aa03.mp4', expected 'aa01.mp4' as in"):
        read_submission(write_lines(tmp_path / "p.jsonl", lines[::-1]), sessions)
    unnamed = write_lines(tmp_path / "p.jsonl", [{}, {"answers": ["x"]}, {}])
    assert read_submission(unnamed, sessions) == [(), ("x",), ()]


@pytest.fixture
def files(tmp_path):
    """(shards with the sessions' clips in test, their sessions file)"""
    clips = [scored(uid).clip for uid in FRAMES]
    data = write_shards(tmp_path / "data", {"test": [replace(clip, clip=i) for i, clip in enumerate(clips)]})
    return data, write_lines(tmp_path / "sessions.jsonl", SESSIONS)


def write_parquet(path, speaking):
    """Another program's scores of the three clips: by clip the frames of high scores."""
    rows = [(uid, frame) for uid, frames in FRAMES.items() for frame in range(frames)]
    columns = {"clip_id": [uid for uid, _ in rows], "frame": [frame for _, frame in rows]}
    columns["speaking_logit"] = [float(frame in speaking[uid]) for uid, frame in rows]
    pq.write_table(pa.table(columns), path)
    return path


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


def test_scores_to_submission_to_the_same_numbers(files, tmp_path, capsys):
    """One interrupt missed, one silent chunk spoken in."""
    data, sessions = files
    scores = write_parquet(tmp_path / "x.parquet", {"aa01": {0, 21, 37}, "aa02": {0}, "aa03": {1, 17}})
    submission = tmp_path / "submission.jsonl"
    options = ["--chunks", sessions, "--threshold", "speaking=0.5", "--out", tmp_path / "a", "--submission", submission]
    assert run(data, "--scores", scores, *options) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "a/metrics.json").read_text())["scores"]["chunks"]
    assert [found["overall"][name] for name in ("tp", "fp", "tn", "fn")] == [5, 1, 4, 1]
    assert found["overall"]["macro_f1"] == 0.8167  # 0.8333 and 0.8
    assert found["overall"]["gmean_f1"] == 0.8165
    low, high = found["overall"]["intervals"]["macro_f1"]
    assert f"0.8167 [{low:.4f}, {high:.4f}]" in printed
    assert "3 sessions, 11 chunks" in printed
    assert "Making [b]tea" in printed
    assert [json.loads(line) for line in submission.read_text().splitlines()] == [
        {"video_path": "aa01.mp4", "answers": ["$interrupt$"] * 3 + ["$silent$"] * 3},
        {"video_path": "aa02.mp4", "answers": ["$interrupt$", "$silent$", "$silent$"]},
        {"video_path": "aa03.mp4", "answers": ["$interrupt$", "$interrupt$"]},
    ]
    assert run("--scores", submission, "--chunks", sessions, "--out", tmp_path / "b") == 0
    assert "0.8167" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/metrics.json").read_text())["submission"]["chunks"] == found


def test_options_that_do_not_go_together_are_refused(files, tmp_path, capsys):
    data, sessions = files
    submission = write_lines(tmp_path / "p.jsonl", [])
    assert run(data, "--scores", "x.parquet", "--submission", submission) == 2
    assert "--submission needs --chunks" in capsys.readouterr().err
    assert run("--scores", submission) == 2
    assert "takes --scores and --chunks alone" in capsys.readouterr().err
    assert run(data, "--scores", submission, "--chunks", sessions) == 2
