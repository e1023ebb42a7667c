"""EgoProactive's metrics: the official scorer's numbers, from scored clips and from submissions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from by_hand import clip_example, turn
from scored import clip_of

from pipeline.errors import InputError
from trainer.evaluation.chunk_metrics import (
    answers_of,
    chunk_rates,
    match_clips,
    read_sessions,
    read_submission,
    report_chunks,
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
        "task": "Making tea",
        "answers": ["$interrupt$Wasser kochen.", "$interrupt$Jetzt aufgießen."],
    },
]  # fmt: skip
INTERRUPTS = {"aa01": ((0, 4), (21, 37), (152, 168)), "aa02": ((0, 16),), "aa03": ((1, 17), (17, 33))}
FRAMES = {"aa01": 184, "aa02": 47, "aa03": 33}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sessions(tmp_path):
    return read_sessions(write_lines(tmp_path / "sessions.jsonl", SESSIONS))


def turns_of(uid):
    query = next(s["query"] for s in SESSIONS if s["video_path"] == f"{uid}.mp4")
    return [turn("user", query), *(turn("assistant", "!", start, end) for start, end in INTERRUPTS[uid])]


@pytest.mark.parametrize(
    ("counts", "rates"),
    [
        ((7, 3, 5, 3), [0.7, 0.625, 0.6625, 0.6614]),  # the official scorer's own hand cases
        ((9, 1, 1, 1), [0.9, 0.5, 0.7, 0.6708]),
        ((10, 0, 0, 0), [1.0, 0.0, 0.5, 0.0]),  # undefined is 0
        ((0, 5, 0, 5), [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_rates_are_the_official_scorers(counts, rates):
    found = chunk_rates(counts)
    assert [round(float(found[f"{name}_f1"]), 4) for name in ("interrupt", "silent", "macro", "gmean")] == rates


def test_counts_are_pooled_and_also_given_by_task(sessions):
    predicted = [
        ["$interrupt$", "$silent$", "$silent$", "$interrupt$", "$interrupt$", "$silent$"],  # tp 2, fn 1, tn 2, fp 1
        [" $interrupt$x", "\n$silent$", "a $interrupt$"],  # tp 1, tn 2
        ["$interrupt$", "sorry"],  # tp 1, fn 1
    ]
    report = report_chunks(sessions, predicted)
    overall = report["overall"]
    assert [overall[name] for name in ("tp", "fp", "tn", "fn", "support")] == [4, 1, 4, 2, 11]
    assert [overall[f"interrupt_{name}"] for name in ("precision", "recall", "f1")] == [0.8, 0.6667, 0.7273]
    assert [overall[f"silent_{name}"] for name in ("precision", "recall", "f1")] == [0.6667, 0.8, 0.7273]
    tea = report["per_task"]["Making tea"]
    assert (tea["support"], tea["interrupt_f1"], tea["macro_f1"]) == (2, 0.6667, 0.3333)
    for name, (low, high) in overall["intervals"].items():
        assert 0 <= low < high <= 1, name
        assert low <= overall[name] <= high, name
    together = report_chunks(sessions, predicted, ["take 1", "take 1", "take 1"])["overall"]  # one recording
    assert (together["recordings"], together["intervals"]["macro_f1"]) == (1, None)


def scored(uid, speaking=(), said=None):
    """The clip of a session: high scores at the frames `speaking`, or live, with the texts `said` by frame."""
    scores = [float(i in speaking) for i in range(FRAMES[uid])]
    clip = clip_of(turns_of(uid), frames=FRAMES[uid], name=uid, recording=uid, speaking=scores)
    return clip if said is None else replace(clip, said=[said.get(i) for i in range(FRAMES[uid])])


@pytest.mark.parametrize(
    ("frames", "interrupts"),
    [
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
    given = answers_of(sessions[0], scored("aa01", frames), 0.5, 1.0)
    assert "".join("I" if answer == "$interrupt$" else "." for answer in given) == interrupts


def test_a_free_running_clip_answers_with_what_it_said(sessions):
    clip = scored("aa01", said={0: "Gravel.", 10: "nobody asked", 21: "Soil.", 30: " And more. ", 60: "?", 152: ""})
    expected = ["$interrupt$Gravel.", "$interrupt$Soil. And more.", "$silent$", "$silent$", "$interrupt$", "$silent$"]
    assert answers_of(sessions[0], clip, None, 1.0) == expected


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
    with pytest.raises(InputError, match=r"line 3 \(aa02.mp4\): the split has no clip of video 'aa02'"):
        match_clips(sessions, clips[:2])


def test_a_submission_is_read_back_as_written(tmp_path, sessions):
    predicted = [["$silent$"] * 6, ["$interrupt$\u2028 über\n"], []]
    write_submission(tmp_path / "out" / "p.jsonl", sessions, predicted)
    rows = [json.loads(line) for line in (tmp_path / "out" / "p.jsonl").read_text().splitlines()]
    assert rows[1] == {"video_path": "aa02.mp4", "answers": ["$interrupt$\u2028 über\n"]}
    assert read_submission(tmp_path / "out" / "p.jsonl", sessions) == [tuple(p) for p in predicted]
    with pytest.raises(InputError, match="2 lines, expected one for each of the 3 sessions, in order"):
        read_submission(write_lines(tmp_path / "p.jsonl", rows[:2]), sessions)
