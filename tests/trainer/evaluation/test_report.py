from __future__ import annotations

import html
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_benchmark import VALUES, Fake, evaluation, make_benchmark

from pipeline.errors import InputError
from trainer.arms import RUNGS
from trainer.evaluation import plots
from trainer.evaluation.benchmark_folder import (
    precision_recall,
    read_benchmark,
    reliability,
    state_over_time,
    training_curves,
)
from trainer.evaluation.conclusions import harness_check, limits, one_seed, question
from trainer.evaluation.disagreements import MAX_LINES, MAX_SECONDS, find_disagreements
from trainer.evaluation.plots import DARK, RUNG_STYLES, format_interval, format_number
from trainer.evaluation.report import write_report

HOSTILE = '<script>alert(1)</script> & "quoted"'
FLOATS = {"speaking_logit": pl.Float32, "speaking_probability": pl.Float32}
FIGURES = {"ladder", "windows", "precision-recall", "reliability", "training"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects ids, links, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags, self.ids, self.links, self.texts = [], [], [], []  # texts: (tag, text)
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in ("meta", "br") else [tag]
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def text(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    def cells(self, heading: str, count: int) -> list[str]:
        """The filled cells that follow a row's heading: mode, then of each arm value and interval."""
        at = self.texts.index(("th", heading))
        return [text for _, text in self.texts[at + 1 : at + 1 + count]]


def limits_of(out: Path) -> str:
    return "\n".join(limits(read_benchmark(out)))


def small(**changes) -> Fake:
    return Fake(clips=1, frames=20, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A benchmark of four arms with its report; one clip has a hostile name and hostile speech."""
    fake = Fake(clips=3, clip_ids=[HOSTILE], said="<b>bold</b> & \x07 <img src=x>")
    out = make_benchmark(tmp_path_factory.mktemp("whole") / "out", fake)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(whole) -> Page:
    return Page((whole / "report.html").read_text())


@pytest.fixture
def one_arm(tmp_path) -> Path:
    return make_benchmark(tmp_path / "out", small(rungs=("speak",), modes=("teacher-forced",)))


# ---- the sentences -----------------------------------------------------------------------------------


def test_page_opens_with_the_answer_and_what_limits_it(page):
    assert page.text("h1") == [
        "On these data, when to speak is told by own state, beyond what speak has; speak+dst is the lowest "
        "rung that reaches the top."
    ]
    assert page.text("p")[1:3] == [
        "Event F1 (self-fed, 5 recordings, 2 seeds): speak 0.500, own state +0.100 [+0.060, +0.140].",
        "speak+dst beats speak by +0.100 event F1 [0.060, 0.140] on 5 recordings, 2 seeds (self-fed).",
    ]
    assert page.text("li")[:4] == [
        "Given the reference's texts speak+dst reaches 0.820 event F1; free-running, given its own, 0.600: exposure "
        "bias costs 0.220. Teacher-forced, speak+dst minus speak would read +0.300 [+0.260, +0.340].",
        "speak+markers, whose state updates carry no content, gains +0.025 over speak: 25% of the gain comes with the "
        "updates (their presence, a second head's labels), not from their "
        "content. speak+dst minus speak+markers: +0.075 [+0.035, +0.115].",
        "With these 5 recordings and 2 seeds a true difference under 0.057 event F1 could well be missed.",
        "2 seeds and 5 recordings are few: what holds here may not hold for others.",
    ]
    assert page.text("p")[3:5] == [
        "Harness check passed: silence and speak are the same model and came out equal (to the last bit).",
        "Split test: 4 rungs, 2 seeds, 5 recordings, 3 clips, 360 frames; 1.0 minutes of training, all runs together, "
        "on 2 cores.",
    ]


LOSS = {**VALUES, ("speak+dst", "self-fed"): 0.3}
SEEDS = (
    "Most of the width of the answer's interval comes from having only 2 seeds (Student's t, 1 degree of freedom); "
    "more seeds narrow it faster than more recordings."
)


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"half_width": 0.2}, "exposure bias costs 0.220", "not from their content"),
        ({"half_width": 0.2}, "", "could well be missed."),  # the headline says it
        ({"values": LOSS}, "speak reaches 0.520 event F1; free-running, given its own, 0.500: exposure", "announc"),
        ({"values": {**VALUES, ("speak+markers", "self-fed"): 0.7}}, "all of the gain", "none of"),
        ({"values": {**VALUES, ("speak+markers", "self-fed"): 0.45}}, "none of the gain", "all of"),
        ({"values": {**VALUES, ("speak+dst", "teacher-forced"): 0.55}}, "exposure bias costs nothing here", "eats"),
        ({"seed_share": 0.5}, "", SEEDS),
        ({"seed_share": 0.75}, SEEDS, "announced"),
        ({"seeds": (0,)}, "5 recordings are few: what", "seed are few"),
        ({"modes": ("teacher-forced",)}, "No free-running evaluation: each model read the reference's texts", "costs"),
    ],
)  # fmt: skip
def test_limits_say_what_the_numbers_allow(tmp_path, changes, said, unsaid):
    text = limits_of(make_benchmark(tmp_path / "out", small(**changes)))
    assert said in text
    assert unsaid not in text


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({"half_width": 0.2}, "No difference between speak+dst and speak could be shown: +0.100 event F1 [-0.100"),
        ({"values": LOSS}, "speak beats speak+dst by +0.200 event F1 [0.160, 0.240]"),
        ({"primary": "median_latency_s"}, "speak+dst beats speak by -0.500 s median latency [-0.540, -0.460] (less is"),
        ({"values": dict.fromkeys(VALUES), "half_width": None}, "No answer: event F1 is undefined for speak+dst"),
        ({"rungs": ("speak",)}, "No answer: speak+dst and speak were not compared. speak reaches 0.500 event F1"),
    ],
)  # fmt: skip
def test_headline_claims_no_more_than_its_interval(tmp_path, changes, starts):
    assert question(read_benchmark(make_benchmark(tmp_path / "out", small(**changes)))).startswith(starts)


@pytest.mark.parametrize(
    ("difference", "check", "said"),
    [(1e-5, "passed", "probabilities differ by up to"), (0.1, "failed", "Trust no number on this page.")],
)
def test_harness_check_allows_a_hundred_thousandth(tmp_path, difference, check, said):
    found, text = harness_check(read_benchmark(make_benchmark(tmp_path / "out", small(silence_differs=difference))))
    assert found == check
    assert said in text


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr(plots, "write_figure", lambda stem, make, label: "<svg></svg>")


def test_one_rung_one_seed_teacher_forced_still_makes_a_page(tmp_path, no_figures):
    fake = small(rungs=("speak",), seeds=(0,), modes=("teacher-forced",))
    page = Page(write_report(make_benchmark(tmp_path / "out", fake)).read_text())
    assert page.text("h1")[0].endswith("speak reaches 0.520 event F1 [0.490, 0.550] (teacher-forced).")
    assert page.text("p")[1].startswith("One seed: the intervals are about other recordings, not other seeds")
    assert {"No timelines: speak+dst did not run.", "No two arms of a pair of interest were run."} <= {*page.text("p")}


def test_undefined_values_are_dashes(tmp_path, no_figures):
    fake = small(rungs=("speak", "speak+dst"), seeds=(0,), values=dict.fromkeys(VALUES), half_width=None)
    page = Page(write_report(make_benchmark(tmp_path / "out", fake)).read_text())
    assert page.cells("event F1", 3) == ["teacher-forced", "-", "-"]
    assert one_seed(read_benchmark(tmp_path / "out")) == "One seed: nothing here says what other seeds would give."


def test_an_arm_without_free_running_scores_is_named_with_the_reason(tmp_path):
    out = make_benchmark(tmp_path / "out", small(rungs=("speak", "speak+dst")))
    path = out / "runs/speak+dst/seed-1/scores/metrics.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "self-fed"}
    path.write_text(json.dumps(content))
    assert "speak+dst was not scored self-fed (seed 1); run the benchmark again." in limits_of(out)
    path.write_text(json.dumps(content | {"thresholds": {"frame": {}, "event": {}}}))
    why = "speak+dst was not self-fed: no threshold could be chosen, as val has no frame to speak at (seed 1)."
    assert why in limits_of(out)
    assert find_disagreements(read_benchmark(out), "speak+dst", "speak") == ([], f"No timelines: {why}")
    path.unlink()
    assert "speak+dst was not evaluated (seed 1); run the benchmark again." in limits_of(out)


def test_a_folder_that_is_no_benchmark_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^[^\n]*not what benchmark leaves [^\n]*run prospect-dst benchmark[^\n]*$"):
        write_report(tmp_path)


# ---- the page ----------------------------------------------------------------------------------------


def test_page_stands_alone(whole, page):
    text = (whole / "report.html").read_text()
    assert text.startswith("<!doctype html>")
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    files = {link for link in page.links if not link.startswith("#")}
    assert all((whole / link).is_file() for link in files)
    assert {Path(link).stem for link in files} >= FIGURES
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.findall(r"https?:|url\((?!#)|@import|\{\{|\{%", text)
    assert len(text) < 3_000_000


def test_text_from_outside_is_never_markup(page):
    assert f"clip {HOSTILE}" in page.text("text")
    assert "<b>bold</b> & \ufffd <img src=x>" in page.text("td")
    assert not {"b", "img"} & set(page.tags)


def test_figures_are_files_and_turn_dark_with_the_page(whole):
    names = {path.stem for path in (whole / "figures").iterdir()}
    assert names >= {*FIGURES, "state", "timeline-1"}
    for name in names:
        assert ET.parse(whole / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (whole / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "var(" not in (whole / "figures" / f"{name}.svg").read_text()
    text = (whole / "report.html").read_text()
    assert set(re.findall(r"var\(--(x[0-9a-f]{6})\)", text)) <= {f"x{colour[1:]}" for colour in DARK}
    assert not re.findall(r'style="[^"]*#[0-9a-f]{6}', text)
    assert len({RUNG_STYLES[rung.name][0] for rung in RUNGS}) == len(RUNGS)


def test_tables_show_arms_intervals_and_baselines(page):
    arms = ["0.520", "0.490 to 0.550", "0.600", "0.570 to 0.630", "0.820", "0.790 to 0.850", "0.520", "0.490 to 0.550"]
    assert page.cells("event F1", 11) == ["teacher-forced", *arms, "0.450", "a metronome every 6 s"]
    assert page.cells("speaking AP", 11)[-2:] == ["0.050", "chance"]
    assert page.cells("median latency (s)", 11)[-2:] == ["self-fed", "0.500"]  # no baseline: the next row follows
    assert page.cells("median latency of right updates (s)", 5) == ["self-fed", "-", "-", "-0.125", "-"]
    assert {"speak+dst - speak", "99.0%", "+0.060 to +0.140"} <= set(page.text("td"))


def test_page_says_where_the_numbers_come_from(whole):
    text = html.unescape(re.sub(r"<[^>]*>", "", (whole / "report.html").read_text()))
    for part in (
        "test: speaking and DST events coincide on 90% of frames",
        "prospect-dst benchmark data --rungs speak,speak+dst --seeds 2",
        *("3.11.9", "ab" * 32, "onset", "speech counts as late as (s)", "A negative latency is no foresight"),
        "chosen on val, teacher-forced, by the best event F1",
    ):
        assert part in text


def test_the_same_folder_gives_the_same_bytes(whole):
    files = [whole / "report.html", *sorted((whole / "figures").iterdir())]
    before = [path.read_bytes() for path in files]
    (whole / "figures" / "timeline-9.svg").write_text("of an earlier report")
    write_report(whole)
    assert [path.read_bytes() for path in files] == before
    assert sorted((whole / "figures").iterdir()) == files[1:]


def test_the_polars_recipe_runs(whole, monkeypatch, capsys):
    recipe = re.search(r'<pre id="recipe">(.*?)</pre>', (whole / "report.html").read_text(), re.DOTALL)
    monkeypatch.chdir(whole)
    exec(html.unescape(recipe.group(1)), {})
    printed = capsys.readouterr().out
    assert "speak+markers" in printed
    assert "speaking_logit" in printed


# ---- curves ------------------------------------------------------------------------------------------


def write_speaking(out: Path, seed: int, labels: list[int], logits: list[float], p: list[float | None]) -> None:
    columns = {"frame": [*range(len(labels))], "speaking_logit": logits, "speaking_probability": p}
    rows = pl.DataFrame(columns | {"speaking_label": labels}, schema_overrides=FLOATS, strict=False)
    rows = rows.with_columns(split=pl.lit("test"), clip_id=pl.lit("c0"))
    rows.write_parquet(out / f"runs/speak/seed-{seed}/scores/teacher-forced.parquet")


def test_precision_at_a_recall_is_that_of_the_highest_threshold_that_reaches_it(one_arm):
    # by falling score: right, wrong, right, (not supervised), wrong -> precision 1 up to recall 0.5, then 2/3
    write_speaking(one_arm, 0, [1, 0, 1, -100, 0], [5, 4, 3, 2.5, 2], [None] * 5)
    write_speaking(one_arm, 1, [1, 0, 1, -100, 0], [5, 1, 3, 2.5, 2], [None] * 5)  # a perfect second seed
    (curve,), chance = precision_recall(read_benchmark(one_arm), "teacher-forced")
    assert chance == 0.5
    at = dict(zip(np.round(curve.seeds[0][0], 2).tolist(), curve.seeds[0][1].tolist(), strict=True))
    assert (at[0.0], at[0.5], at[0.51], at[1.0]) == pytest.approx((1, 1, 2 / 3, 2 / 3))
    assert curve.mean[1][[50, 100]] == pytest.approx((1, 5 / 6))


def test_reliability_leaves_small_bins_and_unknown_probabilities_out(one_arm):
    p = [0.25] * 20 + [0.75] * 19 + [0.5]
    write_speaking(one_arm, 0, [1] * 5 + [0] * 15 + [1] * 19 + [-100], [0.0] * 40, p)
    write_speaking(one_arm, 1, [1] * 40, [0.0] * 40, [None] * 40)
    (curve,) = reliability(read_benchmark(one_arm), "teacher-forced")
    assert [x.tolist() for x in curve.mean] == [[pytest.approx(0.25)], [pytest.approx(0.25)]]
    assert len(curve.seeds) == 1


def test_training_curves_are_means_where_all_seeds_were_evaluated(one_arm):
    first = evaluation(10, 0.5, split="dev") + evaluation(20, 0.75, split="dev") + evaluation(20, 0.7, split="dev")
    (one_arm / "runs/speak/seed-0/metrics.jsonl").write_text(first + evaluation(30, 0.9, split="dev"))
    second = evaluation(10, 0.25, split="dev") + evaluation(20, 0.5, split="dev") + evaluation(30, None, split="dev")
    (one_arm / "runs/speak/seed-1/metrics.jsonl").write_text(second)
    (curve,), split = training_curves(read_benchmark(one_arm), "speaking")
    assert split == "dev"
    assert curve.mean[0].tolist() == [10, 20]
    assert curve.mean[1].tolist() == pytest.approx([0.375, 0.6])
    assert [len(x) for x, _ in curve.seeds] == [3, 2]
    assert training_curves(read_benchmark(one_arm), "dst_update")[0] == []


def test_state_over_the_clip_stands_beside_that_of_no_updates(whole):
    arm, never = state_over_time(read_benchmark(whole), "self-fed")
    assert (arm.rung, never.rung, never.note) == ("speak+dst", "never updating", "0.375")
    assert arm.mean[0].tolist() == [12.5, 37.5, 62.5, 87.5]  # % of the clip
    np.testing.assert_array_equal(arm.mean[1], [1.0, 0.75, 0.5, np.nan])
    np.testing.assert_array_equal(never.mean[1], [0.75, 0.0, np.nan, np.nan])
    assert state_over_time(read_benchmark(whole), "teacher-forced") == []


# ---- timelines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gone", "changed", "no scores"])
def test_without_the_data_there_are_no_timelines_and_the_page_says_why(tmp_path, how):
    out, data = make_benchmark(tmp_path / "out", Fake(clips=2, frames=40)), tmp_path / "out-data"
    if how == "no scores":
        (out / "runs/speak/seed-0/scores/self-fed.parquet").unlink()
    else:
        shutil.rmtree(data)
    if how == "changed":
        make_benchmark(tmp_path / "other", Fake(clips=3, frames=40))
        (tmp_path / "other-data").rename(data)
    clips, about = find_disagreements(read_benchmark(out), "speak+dst", "speak")
    why = {"gone": "not found", "changed": "test is no longer what was evaluated", "no scores": "self-fed.parquet"}[how]
    assert clips == []
    assert about.startswith("No timelines: ")
    assert why in about


def test_clips_with_the_greatest_difference_either_way_are_shown(tmp_path):
    # 120 frames: reference speech at 24, 64 and 104 (12, 32 and 52 s)
    all_right, one_right = (24, 64, 104), (24,)
    spoken = {
        ("speak+dst", "c0"): all_right, ("speak", "c0"): one_right,  # 0 errors against 2
        ("speak+dst", "c1"): all_right, ("speak", "c1"): (40,),  # 0 against 3 missed and 1 false
        ("speak+dst", "c2"): one_right, ("speak", "c2"): one_right,  # even
        ("speak+dst", "c3"): (24, 64), ("speak", "c3"): (24, 64, 104, 90),  # 1 and 1: even
        ("speak+dst", "c4"): (), ("speak", "c4"): all_right,  # 3 against 0
        ("speak+dst", "c5"): all_right, ("speak", "c5"): (24, 64),  # 0 against 1
    }  # fmt: skip
    out = make_benchmark(tmp_path / "out", Fake(rungs=("speak", "speak+dst"), seeds=(0,), spoken=spoken))
    clips, about = find_disagreements(read_benchmark(out), "speak+dst", "speak")
    assert [clip.timeline.title for clip in clips] == ["clip c1", "clip c0", "clip c4"]
    assert "Of 6 clips speak+dst makes fewer in 3, speak in 1; the rest are even." in about
    first, second = clips[0].timeline.tracks
    assert (first.rung, first.hits, first.false_alarms) == ("speak+dst", [12, 32, 52], [])
    assert (second.rung, second.hits, second.false_alarms) == ("speak", [], [20])
    assert first.updates == clips[0].timeline.speech == [12, 32, 52]
    assert [tuple(line) for line in clips[0].lines[:5]] == [
        (10.0, "user", "What comes next?"),
        (12.0, "reference update", "S1->complete"),
        (12.0, "reference", "Well done, part 0."),
        (12.0, "speak+dst update", "S1->complete"),
        (12.0, "speak+dst", "Now attach the wheel."),
    ]
    assert (20.0, "speak", "Now attach the wheel.") in clips[0].lines


def test_of_a_long_clip_a_stretch_is_shown_from_before_the_first_difference(tmp_path):
    frames = 2000  # 1000 s, speech every 20 s from 12 s on; the first arm misses the one at 512 s
    said = [*range(24, frames - 8, 40)]
    spoken = {("speak+dst", "c0"): [frame for frame in said if frame != 1024], ("speak", "c0"): said}
    fake = Fake(rungs=("speak", "speak+dst"), seeds=(0,), clips=1, frames=frames, spoken=spoken, said="x" * 500)
    (clip,), _ = find_disagreements(read_benchmark(make_benchmark(tmp_path / "out", fake)), "speak+dst", "speak")
    assert clip.timeline.span == (492, 492 + MAX_SECONDS)
    assert clip.timeline.subtitle == "Recording take-0. Errors: speak+dst 1, speak 0. 240 s of it are shown."
    assert len(clip.lines) == MAX_LINES
    assert clip.omitted > 0
    assert min(line.seconds for line in clip.lines) == 492
    assert max(len(line.text) for line in clip.lines) == 200


def test_numbers_have_three_decimals_below_ten():
    numbers = [format_number(x) for x in (0.12345, -0.0001, 12.34, 1234.5, None)]
    assert numbers == ["0.123", "0.000", "12.3", "1,234.5", "-"]
    assert format_interval(0.042, 0.011, 0.071, signed=True) == "+0.042 [+0.011, +0.071]"
    assert format_interval(0.042, None, None) == "0.042 (no interval)"
    assert format_interval(None, None, None) == "undefined"
