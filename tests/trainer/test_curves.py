from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from trainer.curves import draw, read_curves, running_mean, spread, thin

STEP = {
    "loss": 1.0,
    "speaking": 0.5,
    "dst_update": 0.25,
    "lm": 0.125,
    "n_speaking": 9.0,
    "n_dst_update": 9.0,
    "n_lm": 5.0,
}
STEP |= {"grad_norm": 2.0, "lr": 0.001}


def written(run: Path, lines: list[dict]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def steps(count: int, **changes) -> list[dict]:
    return [{"step": n, **STEP, **changes} for n in range(1, count + 1)]


def evaluation(step: int, speak: float | None, dst: float | None, split: str = "val") -> dict:
    heads = {"speaking": {"ap": speak, "chance": 0.125}, "dst_update": {"ap": dst, "chance": 0.0625}}
    return {"step": step, "evaluation": {"split": split, **heads, "lm_loss": None}}


def texts(svg: Path) -> list[str]:
    """Every text of the picture; fails where it is no XML."""
    return [e.text or "" for e in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


# ---- numbers -----------------------------------------------------------------------------------------


def test_a_term_with_nothing_to_supervise_is_no_point(tmp_path):
    lines = [*steps(2), {**STEP, "step": 3, "lm": 0.0, "n_lm": 0.0}, {**STEP, "step": 4, "loss": None}]
    curves = read_curves(written(tmp_path, lines))
    assert curves.steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(curves.values["lm"], [0.125, 0.125, math.nan, 0.125])
    np.testing.assert_array_equal(curves.values["loss"], [1, 1, 1, math.nan])
    assert curves.end("loss") == 1.0


def test_what_was_logged_twice_counts_once_and_one_split_is_shown(tmp_path):
    lines = [*steps(2), evaluation(2, 0.25, 0.25), evaluation(2, 0.75, 0.5), evaluation(2, 0.1, 0.1, "test")]
    lines += [{**STEP, "step": 2, "loss": 3.0}, evaluation(1, 0.5, 0.5), evaluation(2, 0.875, 0.5)]
    curves = read_curves(written(tmp_path, lines))
    assert curves.values["loss"].tolist() == [1.0, 3.0]
    assert [(e["step"], e["evaluation"]["speaking"]["ap"]) for e in curves.evaluations] == [(1, 0.5), (2, 0.875)]


def test_the_running_mean_is_of_sums_over_sums_in_both_directions():
    mean = running_mean(np.array([1.0, 4.0, 1.0]), np.ones(3), half_life=1)
    assert mean.tolist() == pytest.approx([(1 + 2 + 0.25) / 1.75, (0.5 + 4 + 0.5) / 2, 3.25 / 1.75])
    weighed = running_mean(np.array([1.0, 4.0]), np.array([1.0, 3.0]), half_life=1)
    assert weighed.tolist() == pytest.approx([(1 + 0.5 * 12) / (1 + 0.5 * 3), (0.5 + 12) / (0.5 + 3)])


def test_the_running_mean_skips_what_is_missing_and_never_invents_it():
    mean = running_mean(np.array([math.nan, 1.0, math.nan, 5.0]), np.array([0.0, 1, 0, 1]), half_life=1)
    np.testing.assert_allclose(mean, [math.nan, (1 + 5 / 4) / (5 / 4), math.nan, (1 / 4 + 5) / (5 / 4)])


def test_thinning_keeps_spikes_and_order():
    values = np.ones(5000)
    values[1234], values[4000], values[17] = 50.0, -3.0, math.nan
    at, kept = thin(np.arange(5000.0), values)
    assert len(at) <= 800
    assert (np.diff(at) >= 0).all()
    assert dict(zip(at, kept, strict=True))[1234] == 50.0
    assert dict(zip(at, kept, strict=True))[4000] == -3.0
    assert thin(np.arange(3.0), np.array([1, math.nan, 2]))[0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([0.5, 0.2], [0.5, 0.2]),  # far enough apart: left alone
        ([0.5, 0.5], [0.55, 0.45]),
        ([0.5, 0.54], [0.47, 0.57]),
        ([0.0, 0.02, 0.5], [0.0, 0.1, 0.5]),  # never below the panel
        ([1.0, 0.99, 0.98, 0.75], [1.0, 0.9, 0.8, 0.7]),  # pushes what it meets
    ],
)
def test_labels_move_apart_in_order(wanted, places):
    assert spread(wanted, 0.1) == pytest.approx(places)


# ---- the picture -------------------------------------------------------------------------------------


def test_the_picture_says_what_was_run_and_what_came_out(tmp_path):
    run = written(tmp_path / "kettle", [*steps(1000), evaluation(500, 0.5, None), evaluation(1000, 0.875, 0.004)])
    svg = draw(run)
    assert svg == run / "curves.svg"
    assert sorted(path.name for path in run.iterdir()) == ["curves.svg", "metrics.jsonl"]
    said = texts(svg)
    assert said.count("kettle: 1,000 steps, loss 1.000") == 1
    assert "val: speaking AP 0.875, DST AP 4.0e-03. Thin: each step." in " ".join(said)
    assert "running mean (half-life 20)" in " ".join(said)
    assert {"Loss", "Average precision on val", "Gradient norm", "Learning rate"} <= set(said)
    assert {"total 1.000", "speaking 0.500", "DST 0.250", "text 0.125"} <= set(said)
    assert {"speaking 0.875", "DST 4.0e-03", "chance 0.125", "chance 0.062"} <= set(said)
    assert svg.read_text().count("stroke-dasharray: 4.8,3.6") == 2  # chance of both heads
    root = ET.parse(svg).getroot()
    assert (root.get("width"), root.get("viewBox").split()[2]) == ("800", "800")


def lines_drawn(svg: Path, look: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """(colour, points) of each path with a look such as 'stroke-width: 2;', that of the running means."""
    found = []
    for path in ET.parse(svg).iter("{http://www.w3.org/2000/svg}path"):
        style, points = path.get("style", ""), re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))
        if look in style:
            found.append((style.split("stroke: ")[1][:7], [(float(x), float(y)) for x, y in points]))
    return found


def test_lines_stand_where_the_numbers_say(tmp_path):
    svg = draw(written(tmp_path, [*steps(4), evaluation(2, 0.51, 1.02), evaluation(4, 1.02, 0.0)]))
    lines = lines_drawn(svg, "stroke-width: 2;")
    # Steps 0..4 on x 56..670. Loss: 0..1.05 on y 310..90, so that 0.35 lies at 310 - 220 / 3.
    loss = dict(lines[:4])
    assert [x for x, _ in loss["#2563eb"]] == pytest.approx([209.5, 363, 516.5, 670])
    for colour, value in {"#1f2328": 1, "#2563eb": 0.5, "#d97706": 0.25, "#0d9488": 0.125}.items():
        assert [y for _, y in loss[colour]] == pytest.approx([310 - 220 * value / 1.05] * 4, abs=1e-3)
    # Precision: 0..1.02 on y 492..372.
    assert lines[4] == ("#2563eb", [(363, 432), (670, 372)])
    assert lines[5] == ("#d97706", [(363, 372), (670, 492)])
    (colour, chance), _ = lines_drawn(svg, "stroke-dasharray: 4.8,3.6")
    assert colour == "#2563eb"
    assert chance == [(56, pytest.approx(492 - 120 * 0.125 / 1.02)), (670, pytest.approx(492 - 120 * 0.125 / 1.02))]


def test_the_same_metrics_give_the_same_bytes_whatever_the_users_style(tmp_path):
    import matplotlib

    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    first, second = (written(tmp_path / side / "run", steps(5)) for side in ("a", "b"))
    one = draw(first).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        assert draw(second).read_bytes() == one
        assert matplotlib.rcParams["font.size"] == 30
    assert draw(first).read_bytes() == one


def test_losses_over_many_decades_are_drawn_on_a_logarithm(tmp_path):
    falling = [{**STEP, "step": n, "loss": 10 ** (-n / 10)} for n in range(1, 41)]
    wide = texts(draw(written(tmp_path / "wide", falling)))
    assert {"0.1", "0.01", "0.001", "0.0001"} <= set(wide)
    narrow = texts(draw(written(tmp_path / "narrow", steps(5, loss=0.2))))
    assert {"0", "0.2", "0.4"} <= set(narrow)
    assert "0.01" not in narrow


def test_without_evaluations_there_is_no_precision_to_draw(tmp_path):
    said = texts(draw(written(tmp_path, steps(3))))
    assert not any("precision" in text or "chance" in text for text in said)
    assert any(text.startswith("Not evaluated.") for text in said)


AWKWARD = {
    "one step": steps(1),
    "two steps": steps(2),
    "a resumed tail": [{**STEP, "step": n} for n in range(90, 121)],
    "all zero": steps(3, loss=0.0, speaking=0.0, dst_update=0.0, lm=0.0, grad_norm=0.0, lr=0.0),
    "zeros among decades": [*steps(3, loss=100.0), {**STEP, "step": 4, "loss": 0.0, "grad_norm": 0.0}],
    "nothing supervised": steps(3, n_speaking=0.0, n_dst_update=0.0, n_lm=0.0),
    "all null": steps(3, loss=None, speaking=None, dst_update=None, lm=None, grad_norm=None, lr=None),
    "fewer numbers": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}],
    "a rate for each part": steps(3, lr={"text": 0.1, "heads": 0.2}),
    "no positive frame": [*steps(2), evaluation(2, None, None)],
    "one head": [*steps(2), evaluation(1, 0.5, None), evaluation(2, None, None)],
    "evaluated before the first step": [evaluation(0, 0.1, 0.2), *steps(2)],
    "one evaluation of one step": [*steps(1), evaluation(1, 1.0, 1.0)],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_runs_are_drawn(tmp_path, name, recwarn):
    said = texts(draw(written(tmp_path, AWKWARD[name])))
    assert "Loss" in said
    assert not recwarn.list
    assert not any("nan" in text or "inf" in text for text in said if "kettle" not in text)


def test_a_run_may_have_any_name(tmp_path):
    name = "$x_1$ <b>&amp; \u202e\x07 " + "long" * 20
    split = "val\x1b[31m$\\frac$ of a very long name"
    said = texts(draw(written(tmp_path / name, [*steps(2), evaluation(2, 0.5, 0.5, split)])))
    assert any(text.startswith("$x_1$ <b>&amp; \ufffd\ufffd longlong") for text in said)
    assert "Average precision on val\ufffd[31m$\\frac…" in said
    assert max(map(len, said)) < 120


@pytest.mark.parametrize("lines", [None, [], [evaluation(1, 0.5, 0.5)]])
def test_nothing_to_draw_is_said_in_one_line(tmp_path, lines):
    if lines is not None:
        written(tmp_path, lines)
    with pytest.raises(InputError, match=r"metrics\.jsonl: found no step, expected what train writes; train first"):
        draw(tmp_path)
    assert not (tmp_path / "curves.svg").exists()


def test_a_long_run_stays_a_small_file(tmp_path):
    noise = np.random.default_rng(0).lognormal(size=(20_000, 2)).tolist()
    lines = [{**STEP, "step": n, "loss": a, "grad_norm": b} for n, (a, b) in enumerate(noise, 1)]
    assert draw(written(tmp_path, lines)).stat().st_size < 200_000
