from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from trainer.curves import draw, make_figure, running_mean

STEP = {"loss": 1.0, "speaking": 0.5, "dst_update": 0.25, "lm": 0.125, "grad_norm": 2.0, "lr": 0.001}
STEP |= {"n_speaking": 9.0, "n_dst_update": 9.0, "n_lm": 5.0}


def written(run: Path, lines: list[dict]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def steps(count: int) -> list[dict]:
    return [{"step": n, **STEP} for n in range(1, count + 1)]


def evaluation(step: int, speaking: float | None, dst: float | None) -> dict:
    heads = {"speaking": {"ap": speaking, "chance": 0.125}, "dst_update": {"ap": dst, "chance": 0.0625}}
    return {"step": step, "evaluation": {"split": "val", **heads, "lm_loss": None}}


def test_running_mean_is_of_sums_over_sums_in_both_directions():
    mean = running_mean(np.array([1.0, 4.0, 1.0]), np.ones(3), half_life=1)
    assert mean.tolist() == pytest.approx([(1 + 2 + 0.25) / 1.75, (0.5 + 4 + 0.5) / 2, 3.25 / 1.75])
    weighed = running_mean(np.array([1.0, 4.0]), np.array([1.0, 3.0]), half_life=1)
    assert weighed.tolist() == pytest.approx([(1 + 0.5 * 12) / (1 + 0.5 * 3), (0.5 + 12) / (0.5 + 3)])
    gaps = running_mean(np.array([math.nan, 1.0, math.nan, 5.0]), np.array([0.0, 1, 0, 1]), half_life=1)
    np.testing.assert_allclose(gaps, [math.nan, (1 + 5 / 4) / (5 / 4), math.nan, (1 / 4 + 5) / (5 / 4)])


def test_figure_shows_steps_means_and_average_precision_against_chance(tmp_path):
    lines = [*steps(400), evaluation(200, 0.5, None), evaluation(400, 0.875, 0.004)]
    run = written(tmp_path / "kettle", lines)
    loss, precision = make_figure("kettle", lines).axes
    drawn = {line.get_label(): line.get_xydata() for line in loss.lines}
    assert [text.get_text() for text in loss.get_legend().texts] == [
        *("total 1.000", "speaking 0.500", "DST 0.250", "text 0.125")
    ]
    assert drawn["speaking 0.500"][[0, -1]].tolist() == [[1, 0.5], [400, 0.5]]
    assert [line.get_label().strip() for line in precision.lines] == [
        *("speaking 0.875", "chance 0.125", "DST 4.0e-03", "chance 0.062")
    ]
    assert precision.lines[0].get_xydata().tolist() == [[200, 0.5], [400, 0.875]]
    draw(run)
    assert "kettle: 400 steps" in (run / "curves.svg").read_text()
