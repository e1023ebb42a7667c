"""The order of a benchmark's runs, what its clock leaves out, and what would narrow its interval."""

from __future__ import annotations

import pytest

from trainer.evaluation.comparison import what_narrows
from trainer.plan import Schedule, in_order

PAIR = ("speak", "speak+dst")
RUNGS = ("metronome", "texts", "speak", "speak+markers", "speak+dst", "true-state")


def shown(units):
    """'m' for metronome, 'Q' for the pair, 'S' for true-state, else the first letter and seed."""
    names = {"speak": "Q", "true-state": "S", "speak+markers": "k"}
    return " ".join(f"{names.get(unit[0][0], unit[0][0][0])}{unit[0][1]}" for unit in units)


def play(schedule, durations, workers=1):
    """Carry out what the schedule says on so many workers, each run as long as its rung says: [(job, begin, end)]."""
    now, running, log = 0.0, {}, []
    while True:
        while len(running) < workers and (job := schedule.next(now)):
            running[job] = now + durations[job[0]]
        if not running:
            return log
        job = min(running, key=lambda job: running[job])
        begun, now = schedule.begun[job], running.pop(job)
        schedule.finish(job, now - begun)
        log.append((job, begun, now))


def test_the_question_has_two_seeds_before_another_rung_has_one():
    assert shown(in_order(RUNGS, PAIR, range(4))) == "m0 Q0 S0 Q1 S1 t0 k0 Q2 S2 Q3 S3 t1 k1 t2 k2 t3 k3"


def test_two_workers_take_the_pair_at_once_and_a_checkpoint_s_rung_when_it_is_there():
    units = in_order(("speak", "speak+dst", "true-state"), PAIR, range(2))
    log = play(Schedule(units, PAIR, workers=2), {"speak": 10.0, "speak+dst": 12.0, "true-state": 1.0}, 2)
    assert [(job, begun) for job, begun, _ in sorted(log, key=lambda run: run[1])] == [
        (("speak", 0), 0.0),
        (("speak+dst", 0), 0.0),
        (("speak", 1), 10.0),
        (("true-state", 0), 12.0),
        (("speak+dst", 1), 13.0),
        (("true-state", 1), 25.0),
    ]


@pytest.mark.parametrize(("until", "expected"), [(45.9, 2), (46.0, 4), (66.9, 4), (67.0, 6)])
def test_no_pair_is_begun_that_would_end_after_the_clock(until, expected):
    """A pair takes 10 + 11 s, and the report 4 s after the last run."""
    schedule = Schedule(in_order(PAIR, PAIR, range(9)), PAIR, until=until, update_s=4.0)
    log = play(schedule, {"speak": 10.0, "speak+dst": 11.0})
    assert len(log) == expected
    assert log[-1][2] + 4.0 <= until


def test_while_nothing_was_measured_one_pair_is_begun_and_no_more():
    schedule = Schedule(in_order(PAIR, PAIR, range(9)), PAIR, workers=4, until=100.0)
    assert [schedule.next(0.0) for _ in range(4)] == [("speak", 0), ("speak+dst", 0), None, None]
    schedule.guess = 30.0
    assert schedule.end([("speak", 0), ("speak+dst", 0)], 10.0) == 30.0
    assert [schedule.next(10.0) for _ in range(3)] == [("speak", 1), ("speak+dst", 1), ("speak", 2)]


@pytest.mark.parametrize(
    ("seeds", "share", "first"),
    [(2, 0.7, "2 more pairs of runs, about 2:00: ±0.138"), (4, 0.1, "twice the 40 recordings: ±0.309")],
)
def test_what_would_narrow_the_interval_most(seeds, share, first):
    """Half-width 0.4 at two seeds: 0.12 due to recordings, 0.382 to seeds, x 3.182 / 2 / (12.706 / sqrt 2) = 0.068 with
    four; hypot(0.068, 0.12) = 0.138. At share 0.1: 0.36 and 0.174, and hypot(0.174, 0.36 / sqrt 2) = 0.309."""
    row = {"low": -0.3, "high": 0.5, "seeds": seeds, "recordings": 40, "seed_share": share}
    text = what_narrows(row, 60.0)
    assert text.startswith("±0.400 now; with ")
    assert first in text.split("; ")[1]
    assert what_narrows(row | {"seeds": 1}, 60.0).startswith("a second pair of runs, about 1:00, would tell")
