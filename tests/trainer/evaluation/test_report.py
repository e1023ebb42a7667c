from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_benchmark import VALUES, Fake, make_benchmark

from pipeline.errors import InputError
from trainer.arms import ARMS
from trainer.evaluation.benchmark_folder import precision_recall, read_benchmark, reliability, state_over_time, training
from trainer.evaluation.disagreements import MOST_LINES, MOST_S, find_moments
from trainer.evaluation.plots import ARM_STYLES, DARK, number, spell
from trainer.evaluation.report import opening, write_report

HOSTILE = '<script>alert(1)</script> & "quoted"'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects ids, loads, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [tag] if tag not in VOID else []
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]

    def text(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def told(out: Path) -> str:
    """What the page opens with, as plain text."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", opening(read_benchmark(out))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A benchmark of four arms with its report; one clip has a hostile name and hostile speech."""
    fake = Fake(clips=3, clip_ids=[HOSTILE], said="<b>bold</b> & \x07 <img src=x>")
    out = make_benchmark(tmp_path_factory.mktemp("whole") / "out", fake)
    write_report(out)
    return out


# ---- the answer --------------------------------------------------------------------------------------


def test_the_page_opens_with_the_answer_and_what_qualifies_it(whole):
    page = Page((whole / "report.html").read_text())
    assert page.text("h1") == [
        "speak+dst beats speak by +0.100 event F1 [0.060, 0.140] on 5 recordings, 2 seeds (self-fed)."
    ]
    assert page.text("li")[:4] == [
        "Given the reference's texts speak+dst reaches 0.820 event F1; given its own, 0.600: exposure bias eats 0.220. "
        "Teacher-forced, speak+dst minus speak would read +0.300 [+0.260, +0.340].",
        "speak+markers, whose state updates carry no content, gains +0.025 over speak: 25% of the gain is announcement "
        "(an update says that speech is near), not content. speak+dst minus speak+markers: +0.075 [+0.035, +0.115].",
        "With these 5 recordings and 2 seeds a true difference under 0.057 event F1 could well be missed.",
        "2 seeds and 5 recordings are few: what holds here may not hold for others.",
    ]
    assert page.text("p")[1:3] == [
        "Harness check passed: silence and speak, the same model written twice, came out equal (to the last bit).",
        "Split test: 4 arms, 2 seeds, 5 recordings, 3 clips, 360 frames; 1.0 minutes of training, all runs together, "
        "on 2 cores.",
    ]


def test_where_no_difference_was_shown_no_gain_is_explained(tmp_path):
    opened = told(make_benchmark(tmp_path / "out", Fake(clips=1, half_width=0.2)))
    assert "No difference between speak+dst and speak could be shown: +0.100 event F1 [-0.100, 0.300]" in opened
    assert "announcement" not in opened
    assert "could well be missed." not in opened  # the answer has said it
    assert "exposure bias eats 0.220" in opened


def test_a_loss_is_told_as_the_other_arms_win(tmp_path):
    values = {**VALUES, ("speak+dst", "self-fed"): 0.3}
    opened = told(make_benchmark(tmp_path / "out", Fake(clips=1, values=values)))
    assert "speak beats speak+dst by +0.200 event F1 [0.160, 0.240]" in opened
    assert (
        "Given the reference's texts speak reaches 0.520 event F1; given its own, 0.500: exposure bias eats 0.020."
        in opened
    )
    assert "announcement" not in opened


@pytest.mark.parametrize(("fed", "share"), [(0.7, "all of the gain"), (0.45, "none of the gain")])
def test_markers_that_gain_more_than_all_or_less_than_nothing_are_told_so(tmp_path, fed, share):
    values = {**VALUES, ("speak+markers", "self-fed"): fed}
    assert share in told(make_benchmark(tmp_path / "out", Fake(clips=1, values=values)))


@pytest.mark.parametrize(
    ("f1", "says"),
    [
        (0.45, None),  # the lowest interval, speak's, is 0.47 to 0.53; speak+dst's 0.57 to 0.63
        (0.56, None),
        (0.58, "No arm is shown to beat a metronome that speaks every 6.5 s (0.580)"),
        (0.825, "No arm beats a metronome that speaks every 6.5 s (0.825)"),
    ],
)
def test_event_f1_that_a_metronome_has_too_is_no_skill(tmp_path, f1, says):
    opened = told(make_benchmark(tmp_path / "out", Fake(clips=1, frames=20, metronome=(6.5, f1))))
    if says is None:
        assert "metronome" not in opened
    else:
        assert (
            f"{says}: at this window (from 2 s early to 4 s late) event F1 does not show skill; "
            "narrow it with --early-s and --late-s." in opened
        )


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.5, False), (0.75, True)])
def test_seeds_that_make_most_of_the_interval_are_said_to(tmp_path, share, said):
    opened = told(make_benchmark(tmp_path / "out", Fake(clips=1, frames=20, seed_share=share)))
    assert said is (
        "Most of the width of the answer's interval comes from having only 2 seeds (Student's t, 1 degree of freedom); "
        "more seeds narrow it faster than more recordings." in opened
    )


def test_one_seed_is_marked_in_red(tmp_path):
    opened = opening(read_benchmark(make_benchmark(tmp_path / "out", Fake(seeds=(0,), clips=1, frames=20))))
    assert (
        '<p class="alarm">One seed: the intervals tell only of other recordings, not of other seeds, and are too '
        "narrow for that.</p>" in opened
    )
    assert "5 recordings are few: what" in opened


def test_a_model_that_does_better_on_its_own_text_lost_nothing(tmp_path):
    values = {**VALUES, ("speak+dst", "teacher-forced"): 0.55}
    assert "exposure bias eats nothing here" in told(make_benchmark(tmp_path / "out", Fake(clips=1, values=values)))


def test_less_is_better_where_it_is(tmp_path):
    info = {"primary": {"metric": "median_latency_s", "mode": "self-fed", "pair": ["speak+dst", "speak"]}}
    out = make_benchmark(tmp_path / "out", Fake(arms=("speak", "speak+dst"), clips=1, seeds=(0,), info=info))
    rows = pq.read_table(out / "comparisons.parquet").to_pylist()
    for row in rows:
        row |= {"difference": -0.5, "low": -0.75, "high": -0.25}
    pq.write_table(pa.Table.from_pylist(rows), out / "comparisons.parquet")
    opened = told(out)
    assert "speak+dst beats speak by -0.500 s median latency [-0.750, -0.250] (less is better)" in opened
    assert "a true difference under 0.057 s median latency could well be missed" in opened


def test_a_failed_harness_check_is_red(tmp_path):
    bench = read_benchmark(make_benchmark(tmp_path / "out", Fake(clips=1, silence_differs=0.1)))
    alarm = re.search(r'<p class="alarm">([^<]*)</p>', opening(bench))
    assert alarm is not None
    assert alarm.group(1).startswith("Harness check FAILED: silence and speak are the same model written twice")
    assert alarm.group(1).endswith("Trust no number on this page.")


def test_a_harness_within_a_hundred_thousandth_passes(tmp_path):
    opened = told(make_benchmark(tmp_path / "out", Fake(clips=1, silence_differs=1e-5)))  # sigmoid: at most a quarter
    assert re.search(r"Harness check passed: .* differ by up to 2\.\de-06, 1e-5 is allowed", opened)


# ---- what may be missing -----------------------------------------------------------------------------


def test_one_arm_one_seed_and_no_self_fed_pass_still_make_a_page(tmp_path):
    fake = Fake(arms=("speak",), seeds=(0,), modes=("teacher-forced",), clips=1, frames=60)
    page = Page(write_report(make_benchmark(tmp_path / "out", fake)).read_text())
    assert page.text("h1") == [
        "No answer: speak+dst and speak were not compared. "
        "speak reaches 0.520 event F1 [0.490, 0.550] (teacher-forced)."
    ]
    assert (
        "No self-fed pass was made: each model read the reference's texts, which no user has. That flatters."
        in page.text("li")
    )
    assert "Harness not checked: that needs the arms silence and speak, which must come out equal." in page.text("p")
    assert "No timelines: speak+dst did not run." in page.text("p")
    assert "No two arms of a pair of interest were run." in page.text("p")


def test_what_is_undefined_is_a_dash_and_said_so(tmp_path):
    values = dict.fromkeys(VALUES, None)
    fake = Fake(arms=("speak", "speak+dst"), seeds=(0,), clips=1, values=values, half_width=None)
    page = Page(write_report(make_benchmark(tmp_path / "out", fake)).read_text())
    assert page.text("h1") == [
        "No answer: event F1 is undefined for speak+dst, speak or both, on 5 recordings, 1 seed (self-fed)."
    ]
    assert "undefined" in page.text("text")
    assert "-" in page.text("td")


def test_an_arm_without_a_self_fed_pass_is_said_to_lack_it_and_why(tmp_path):
    out = make_benchmark(tmp_path / "out", Fake(arms=("speak", "speak+dst"), clips=1, frames=20))
    metrics = out / "runs/speak+dst/seed-1/scores/metrics.json"
    content = json.loads(metrics.read_text())
    del content["self-fed"]
    metrics.write_text(json.dumps(content))
    assert "speak+dst was not self-fed (seed 1), though there is a threshold to speak at; run the" in told(out)
    metrics.write_text(json.dumps(content | {"thresholds": {"frame": {}, "event": {}}}))
    why = "speak+dst was not self-fed: no threshold could be chosen, as val has no frame to speak at (seed 1)."
    assert why in told(out)
    assert find_moments(read_benchmark(out), "speak+dst", "speak") == ([], f"No timelines: {why}")
    metrics.unlink()
    assert "speak+dst was not evaluated (seed 1); run the benchmark again." in told(out)


@pytest.mark.parametrize("how", ["gone", "changed", "no scores"])
def test_without_the_data_there_are_no_timelines_and_the_page_says_why(tmp_path, how):
    out = make_benchmark(tmp_path / "out", Fake(clips=2))
    data = tmp_path / "out-data"
    if how == "gone":
        shutil.rmtree(data)
    elif how == "changed":
        other = tmp_path / "other"
        other.mkdir()
        make_benchmark(other / "out", Fake(clips=3))
        shutil.rmtree(data)
        (other / "out-data").rename(data)
    else:
        (out / "runs" / "speak" / "seed-0" / "scores" / "self-fed.parquet").unlink()
    found, about = find_moments(read_benchmark(out), "speak+dst", "speak")
    assert found == []
    assert about.startswith("No timelines: ")
    why = {"gone": "not found", "changed": "test is no longer what was evaluated", "no scores": "self-fed.parquet"}[how]
    assert why in about


def test_a_folder_that_is_no_benchmarks_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"not what benchmark leaves .*run prospect-dst benchmark") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


# ---- the page ----------------------------------------------------------------------------------------


def test_the_page_stands_alone(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    files = {link for link in page.links if not link.startswith("#")}
    assert all((whole / link).is_file() for link in files)
    assert {Path(link).stem for link in files} >= {"arms", "differences", "precision-recall", "reliability", "training"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.findall(r"https?:|url\((?!#)|@import", text)
    assert "{{" not in text
    assert len(text) < 3_000_000


def test_what_comes_from_outside_is_shown_and_never_markup(whole):
    page = Page((whole / "report.html").read_text())
    assert f"clip {HOSTILE}" in page.text("text")
    assert "<b>bold</b> &   <img src=x>" in page.text("td")
    assert not {"b", "img"} & page.tags


def test_figures_are_there_as_files(whole):
    names = {path.stem for path in (whole / "figures").iterdir()}
    assert {"arms", "differences", "precision-recall", "reliability", "training", "state", "timeline-1"} <= names
    for name in names:
        assert ET.parse(whole / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (whole / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "var(" not in (whole / "figures" / f"{name}.svg").read_text()


def test_every_colour_of_a_figure_turns_dark_with_the_page(whole):
    text = (whole / "report.html").read_text()
    light, dark = re.findall(r"(--x1f2328: #\w+;.*)", text)
    assert "--x1f2328: #1f2328;" in light
    assert "--x1f2328: #e4e7eb;" in dark
    used = set(re.findall(r"var\(--(x[0-9a-f]{6})\)", text))
    assert used <= {f"x{colour[1:]}" for colour in DARK}
    assert not re.findall(r'style="[^"]*#[0-9a-f]{6}', text)


def test_all_arms_have_their_own_colour_and_are_named_in_the_tables(whole):
    assert set(ARM_STYLES) == set(ARMS)
    assert len({colour for colour, _, _ in ARM_STYLES.values()}) == len(ARMS)
    page = Page((whole / "report.html").read_text())
    assert {"silence", "speak", "speak+dst", "speak+markers"} <= set(page.text("th"))
    cells = page.text("td")
    assert "speak+dst - speak" in cells
    assert "99.0%" in cells
    assert "+0.060 to +0.140" in cells
    assert "state accuracy nobody knows" in page.text("th")


def row(page: Page, heading: str) -> list[str]:
    """The filled cells of the first table row under a heading: mode, then of `whole`'s four arms value and interval."""
    at = page.texts.index(("th", heading))
    return [text for _, text in page.texts[at + 1 : at + 12]]


def test_what_guessing_gets_stands_beside_what_the_arms_get(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    arms = ["0.520", "0.490 to 0.550", "0.520", "0.490 to 0.550", "0.820", "0.790 to 0.850", "0.600", "0.570 to 0.630"]
    assert row(page, "event F1") == ["teacher-forced", *arms, "0.450", "a metronome, every 6 s"]
    assert row(page, "speaking AP")[-2:] == ["0.050", "guessing"]
    assert row(page, "median latency (s)")[-2:] == ["self-fed", "0.500"]  # guessing has none: the next row
    figure = page.text("text")
    assert "a metronome, every 6 s: 0.450" in figure
    assert "guessing: 0.050" in figure
    assert text.count("A negative latency is no foresight") == 1


def test_the_state_is_drawn_over_the_clip_beside_that_of_no_updates(whole):
    bench = read_benchmark(whole)
    arm, never = state_over_time(bench, "self-fed")
    assert (arm.arm, never.arm, never.note) == ("speak+dst", "never updating", "0.375")
    assert arm.mean[0].tolist() == [12.5, 37.5, 62.5, 87.5]  # % of the clip
    np.testing.assert_array_equal(arm.mean[1], [1.0, 0.75, 0.5, np.nan])
    np.testing.assert_array_equal(never.mean[1], [0.75, 0.0, np.nan, np.nan])
    assert state_over_time(bench, "teacher-forced") == []
    page = Page((whole / "report.html").read_text())
    assert "Joint state accuracy, self-fed" in page.text("text")
    assert row(page, "median latency of right updates (s)")[:5] == ["self-fed", "-", "-", "-0.125", "-"]


def test_where_it_comes_from_is_told(whole):
    text = html.unescape(re.sub(r"<[^>]*>", "", (whole / "report.html").read_text()))
    for said in (
        "test: speaking and DST events coincide on 90% of frames",
        "prospect-dst benchmark data --arms speak,speak+dst --seeds 2",
        "3.11.9",
        "ab" * 32,
        "onset",
        "speech counts as late as (s)",
        "chosen on val with the reference's texts in the context, by the best event F1; the self-fed pass runs with",
    ):
        assert said in text


def test_the_same_folder_gives_the_same_bytes(whole):
    files = [whole / "report.html", *sorted((whole / "figures").iterdir())]
    before = [path.read_bytes() for path in files]
    (whole / "figures" / "timeline-9.svg").write_text("of an earlier report")
    write_report(whole)
    assert [path.read_bytes() for path in files] == before
    assert sorted((whole / "figures").iterdir()) == files[1:]


def test_the_recipe_runs(whole):
    found = re.search(r'<pre id="recipe">(.*?)</pre>', (whole / "report.html").read_text(), re.DOTALL)
    assert found is not None
    done = subprocess.run(
        [sys.executable, "-c", html.unescape(found.group(1))], cwd=whole, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "speak+markers" in done.stdout
    assert "speaking_logit" in done.stdout


# ---- curves ------------------------------------------------------------------------------------------


def scores(out: Path, arm: str, seed: int, labels: list[int], logits: list[float], p: list[float | None]) -> None:
    n = len(labels)
    columns = {
        "split": ["test"] * n,
        "clip_id": ["c0"] * n,
        "frame": list(range(n)),
        "speaking_logit": pa.array(logits, pa.float32()),
        "speaking_probability": pa.array(p, pa.float32()),
        "speaking_label": pa.array(labels, pa.int8()),
    }
    pq.write_table(pa.table(columns), out / "runs" / arm / f"seed-{seed}" / "scores" / "teacher-forced.parquet")


@pytest.fixture
def small(tmp_path) -> Path:
    return make_benchmark(tmp_path / "out", Fake(arms=("speak",), modes=("teacher-forced",), clips=1, frames=20))


def test_precision_at_a_recall_is_that_of_the_highest_threshold_that_reaches_it(small):
    # by falling score: right, wrong, right, (unlabelled), wrong -> precision 1 up to recall 0.5, then 2/3
    scores(small, "speak", 0, [1, 0, 1, -100, 0], [5, 4, 3, 2.5, 2], [None] * 5)
    # a perfect second seed
    scores(small, "speak", 1, [1, 0, 1, -100, 0], [5, 1, 3, 2.5, 2], [None] * 5)
    (curve,), chance = precision_recall(read_benchmark(small), "teacher-forced")
    assert chance == 0.5
    recalls, precisions = curve.seeds[0]
    at = dict(zip(np.round(recalls, 2).tolist(), precisions.tolist(), strict=True))
    assert (at[0.0], at[0.5], at[0.51], at[1.0]) == pytest.approx((1, 1, 2 / 3, 2 / 3))
    mean = dict(zip(np.round(curve.mean[0], 2).tolist(), curve.mean[1].tolist(), strict=True))
    assert (mean[0.5], mean[1.0]) == pytest.approx((1, 5 / 6))


def test_calibration_leaves_small_bins_and_unknown_probabilities_out(small):
    p = [0.25] * 20 + [0.75] * 19 + [0.5]
    scores(small, "speak", 0, [1] * 5 + [0] * 15 + [1] * 19 + [-100], [0.0] * 40, p)
    scores(small, "speak", 1, [1] * 40, [0.0] * 40, [None] * 40)
    (curve,) = reliability(read_benchmark(small), "teacher-forced")
    assert [x.tolist() for x in curve.mean] == [[pytest.approx(0.25)], [pytest.approx(0.25)]]
    assert len(curve.seeds) == 1


def test_training_curves_are_means_where_all_seeds_were_evaluated(small):
    def line(step: int, ap: float | None) -> str:
        evaluation = {"split": "dev", "speaking": {"ap": ap}, "dst_update": {"ap": None}}
        return json.dumps({"step": step, "evaluation": evaluation}) + "\n"

    (small / "runs/speak/seed-0/metrics.jsonl").write_text(
        line(10, 0.5) + line(20, 0.75) + line(20, 0.7) + line(30, 0.9)
    )
    (small / "runs/speak/seed-1/metrics.jsonl").write_text(line(10, 0.25) + line(20, 0.5) + line(30, None))
    (curve,), split = training(read_benchmark(small), "speaking")
    assert split == "dev"
    assert curve.mean[0].tolist() == [10, 20]
    assert curve.mean[1].tolist() == pytest.approx([0.375, 0.6])
    assert [len(x) for x, _ in curve.seeds] == [3, 2]
    assert training(read_benchmark(small), "dst_update")[0] == []


# ---- timelines ---------------------------------------------------------------------------------------


def test_the_clips_shown_are_those_of_the_greatest_difference_either_way(tmp_path):
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
    out = make_benchmark(tmp_path / "out", Fake(arms=("speak", "speak+dst"), seeds=(0,), spoken=spoken))
    found, about = find_moments(read_benchmark(out), "speak+dst", "speak")
    assert [moment.picture.title for moment in found] == ["clip c1", "clip c0", "clip c4"]
    assert "Of 6 clips speak+dst makes fewer in 3, speak in 1; the rest are even." in about
    first, second = found[0].picture.tracks
    assert (first.arm, first.hits, first.false) == ("speak+dst", [12, 32, 52], [])
    assert (second.arm, second.hits, second.false) == ("speak", [], [20])
    assert first.updates == [12, 32, 52]
    assert found[0].picture.speech == [12, 32, 52]
    assert [tuple(line) for line in found[0].lines[:5]] == [
        (10.0, "user", "What comes next?"),
        (12.0, "reference update", "S1->complete"),
        (12.0, "reference", "Well done, part 0."),
        (12.0, "speak+dst update", "S1->complete"),
        (12.0, "speak+dst", "Now attach the wheel."),
    ]
    assert (20.0, "speak", "Now attach the wheel.") in found[0].lines


def test_of_a_long_clip_a_stretch_is_shown_from_before_the_first_difference(tmp_path):
    frames = 2000  # 1000 s, speech every 20 s from 12 s on; the first arm misses the one at 512 s
    said = [*range(24, frames - 8, 40)]
    spoken = {("speak+dst", "c0"): [f for f in said if f != 1024], ("speak", "c0"): said}
    fake = Fake(arms=("speak", "speak+dst"), seeds=(0,), clips=1, frames=frames, spoken=spoken, said="x" * 500)
    (moment,), _ = find_moments(read_benchmark(make_benchmark(tmp_path / "out", fake)), "speak+dst", "speak")
    picture = moment.picture
    assert (picture.start_s, picture.end_s) == (492, 492 + MOST_S)
    assert picture.about == "Recording take-0. Errors: speak+dst 1, speak 0. 240 s of it are shown."
    assert len(picture.tracks[0].times) == 481
    assert min(picture.speech) == 492
    assert len(moment.lines) == MOST_LINES
    assert moment.left_out > 0
    assert max(len(line.text) for line in moment.lines) == 200


# ---- numbers -----------------------------------------------------------------------------------------


def test_numbers_are_spelt_alike_everywhere():
    assert [number(x) for x in (0.1234, -0.00001, 12.345, 1234.5, None, float("nan"))] == [
        "0.123", "0.000", "12.3", "1,234.5", "-", "-",
    ]  # fmt: skip
    assert [number(x, signed=True) for x in (0.5, 0.0, -0.5)] == ["+0.500", "0.000", "-0.500"]
    assert spell(0.25, 0.125, 0.5, signed=True) == "+0.250 [+0.125, +0.500]"
    assert spell(0.25, None, None) == "0.250 (no interval)"
    assert spell(None, None, None) == "undefined"
