"""`inspect` against three hand-labelled clips: every expected number below was counted by eye.

Labels are written as strings: `1` positive, `0` supervised silence, `.` not sampled.
"""

import base64
import hashlib
import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline import inspect, summary, terminal, timeline
from pipeline import output as shards
from pipeline import viewer as inspect_html
from pipeline.errors import InputError
from pipeline.schema import CLIPS, FRAMES, SCHEMA_HASH, SCHEMA_VERSION, shard_path

LABEL = {"1": 1, "0": 0, ".": -100}
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \x1b[2J \u202e {{POLICY}}"


def labels(text):
    return np.array([LABEL[c] for c in text], np.int8)


def turn(role, text, start=None, end=None, time=None, updates=()):
    updates = [{"id": i, "transition": t} for i, t in updates]
    return {
        "role": role,
        "text": text,
        "start_frame": start,
        "end_frame": end,
        "time_s": time,
        "updates": updates,
    }


def make_clip(clip_id, speaking, dst, start=0, fps=2.0, recording="rec-1", turns=(), steps=(), **more):
    s, d = labels(speaking), labels(dst)
    row = {
        "clip_id": clip_id,
        "clip": 0,
        "video_uid": f"video of {clip_id}",
        "recording_id": recording,
        "dataset": "made",
        "clip_idx": 0,
        "fps": fps,
        "start_frame": start,
        "end_frame": start + len(s),
        "num_frames": len(s),
        "goal": "Build a <toy>",
        "steps": [{"id": i, "name": n} for i, n in steps],
        "initial_state": [],
        "turns": list(turns),
        "sampling_seed": 1,
        "neg_rate": 0.5,
        "positive": "span",
        "frame_convention": "event",
        "n_speaking": int((s == 1).sum()),
        "n_dst_update": int((d == 1).sum()),
        "n_supervised": int(((s != -100) | (d != -100)).sum()),
    }
    return row | more, s, d


def write_folder(folder, splits, parts=1, **manifest):
    """A finished output folder of `splits`: name -> clips of make_clip, dealt out to `parts` shards."""
    shards = []
    for split, clips in splits.items():
        for number, (row, _, _) in enumerate(clips):
            row["clip"] = number
        for part, chosen in enumerate(np.array_split(np.arange(len(clips)), parts)):
            some = [clips[i] for i in chosen]
            shards.append(write_shard(folder, shard_path("clips", split, part), clips_table(some)))
            shards.append(write_shard(folder, shard_path("frames", split, part), frames_table(some)))
    manifest = {"schema_version": SCHEMA_VERSION, "schema_hash": SCHEMA_HASH, "shards": shards} | manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_shard(folder, name, table):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    body = path.read_bytes()
    return {"path": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


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


@pytest.fixture
def toy(tmp_path):
    return write_folder(tmp_path / "out", toy_splits())


def text_of(renderable, width=100, **console):
    file = StringIO()
    Console(file=file, width=width, color_system=None, **console).print(renderable)
    return file.getvalue()


# ---- summary -----------------------------------------------------------------------------------------


def test_counts_of_hand_labelled_clips(toy):
    train, val = inspect.summarise(toy).splits
    assert (train.name, train.clips, train.recordings, train.frames) == ("train", 2, 2, 18)
    assert train.hours == pytest.approx(9 / 3600)
    cells = (train.speak_only, train.dst_only, train.both, train.silence, train.not_sampled)
    assert cells == (4, 0, 2, 7, 5)
    assert train.supervised == pytest.approx(13 / 18)
    assert train.first == 1
    speaking = summary.Head(
        positives=6, frames=18, supervised=13, clips=2, first=1, gaps={2.0: 1}, usual_gap=(2.0, 1, 1)
    )
    assert train.heads["speaking"] == speaking
    assert (speaking.before, speaking.after, speaking.median_gap) == (6 / 18, 6 / 13, 2.0)
    assert (val.speak_only, val.dst_only, val.both, val.silence, val.not_sampled) == (1, 2, 0, 3, 0)
    assert val.hours == pytest.approx(1.5 / 3600)


def test_a_clip_without_dst_says_nothing_about_that_head(toy):
    dst = inspect.summarise(toy).splits[0].heads["DST"]
    assert dst == summary.Head(
        positives=2, frames=10, supervised=7, clips=1, first=1, gaps={3.0: 1}, usual_gap=(3.0, 1, 1)
    )


def test_a_clip_with_nothing_sampled_still_counts_before_sampling(tmp_path):
    clips = [
        make_clip("a", "1...", "0...", steps=[("S1", "x")]),
        make_clip("b", "....", "....", steps=[("S1", "x")]),
    ]
    heads = inspect.summarise(write_folder(tmp_path, {"train": clips})).splits[0].heads
    assert [heads["speaking"].frames, heads["DST"].frames] == [8, 8]
    assert (heads["speaking"].before, heads["speaking"].after) == (1 / 8, 1.0)


def test_gaps_do_not_reach_from_one_clip_to_the_next(tmp_path):
    clips = [make_clip(f"c{i}", "1000", "0000") for i in range(3)]
    speaking = inspect.summarise(write_folder(tmp_path, {"train": clips})).splits[0].heads["speaking"]
    assert speaking.gaps == {}
    assert speaking.median_gap is None


def test_parts_do_not_change_the_summary(tmp_path):
    clips = [make_clip(f"c{i}", "10010" * (i + 1), "01000" * (i + 1), start=7 * i) for i in range(5)]
    one = write_folder(tmp_path / "one", {"train": clips}, parts=1)
    three = write_folder(tmp_path / "three", {"train": clips}, parts=3)
    assert inspect.summarise(one) == inspect.summarise(three)


def test_hazards_the_shards_show(toy):
    found = {(h["name"], h["split"]): h["text"] for h in inspect.summarise(toy).hazards}
    assert set(found) == {
        ("heads coincide", "train"),
        ("events at the first frame", "val"),
        ("recording in several splits", "train+val"),
    }
    assert found["heads coincide", "train"].startswith("2 of 2 DST frames are positive for both heads")
    assert found["events at the first frame", "val"].startswith("1 of 1 clips begin on an event")
    assert "e.g. rec-1" in found["recording in several splits", "train+val"]


def test_implausible_rates_and_empty_heads_are_hazards(tmp_path):
    folder = write_folder(tmp_path, {"train": [make_clip("a", "0111", "...."), make_clip("b", "0111", "....")]})
    names = [h["name"] for h in inspect.summarise(folder).hazards]
    assert names == ["implausible positive rate", "head without positives"]


def test_summary_table_fits_100_columns_and_tells_drops_and_hazards(toy):
    manifest = {
        "splits": {"train": {"drops": {"outside the clip": 1, "empty range": 0}}},
        "hazards": [
            {
                "name": "frames missing",
                "split": "train",
                "text": "3 videos are shorter than their annotations",
            }
        ],
        "inputs": [{"path": "/x/train_t.json", "clips": 2, "frame_convention": "event", "quarantined": 1}],
    }
    text = text_of(summary.render_summary(inspect.summarise(toy), manifest))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["supervised", "frames", "72.2%", "100.0%"] for line in lines)
    assert any(line.split() == ["dropped:", "outside", "the", "clip", "1", "-"] for line in lines)
    assert "empty range" not in text
    assert "train_t.json: 2 clips, event convention, 1 quarantined" in lines
    assert "hazard [train] 3 videos are shorter than their annotations" in lines
    assert sum("hazard" in line for line in lines) == 4


def test_a_hazard_in_the_manifest_is_not_told_twice(toy):
    found = inspect.summarise(toy)
    told = [{"name": "heads coincide", "split": "train", "text": "as preprocess says"}]
    texts = [h["text"] for h in summary.all_hazards(found, {"hazards": told})]
    assert "as preprocess says" in texts
    assert len(texts) == 3


def test_summary_renders_with_an_empty_manifest(toy):
    assert "speaking positives" in text_of(summary.render_summary(inspect.summarise(toy), {}))


# ---- verify ------------------------------------------------------------------------------------------

FRAMES_0 = "frames/split=train/part-00000.parquet"


def refusal(folder):
    with pytest.raises(InputError) as error:
        shards.verify(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_intact_folder_verifies(toy):
    assert len(shards.verify(toy)["shards"]) == 4


def test_an_edited_shard_is_named_with_both_checksums(toy):
    path = toy / FRAMES_0
    body = bytearray(path.read_bytes())
    before = hashlib.sha256(body).hexdigest()
    body[100] ^= 1
    path.write_bytes(body)
    text = refusal(toy)
    assert FRAMES_0 in text
    assert before in text
    assert hashlib.sha256(body).hexdigest() in text
    assert "prospect-dst preprocess" in text


def test_a_cut_shard_a_missing_one_and_a_stray_one_are_named(toy):
    body = (toy / FRAMES_0).read_bytes()
    (toy / FRAMES_0).write_bytes(body[:-1])
    assert f"{FRAMES_0}: damaged or edited, found {len(body) - 1:,} bytes, expected {len(body)}" in refusal(toy)
    (toy / FRAMES_0).unlink()
    assert f"{FRAMES_0}: listed in manifest.json, but missing" in refusal(toy)
    (toy / FRAMES_0).write_bytes(body)
    (toy / "clips/split=train/part-00007.parquet").write_bytes(body)
    assert "part-00007.parquet: a shard that manifest.json does not list" in refusal(toy)


def test_no_manifest_is_no_finished_output(tmp_path):
    assert f"no manifest.json in {tmp_path}: not a finished output; run `prospect-dst" in refusal(tmp_path)
    assert "no manifest.json in" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"shards": 3}', b"\xff", b'{"shards": [], "schema_version": 99}'])
def test_a_broken_manifest_is_one_line(toy, body):
    (toy / "manifest.json").write_bytes(body)
    assert "manifest.json: " in refusal(toy)


def test_a_manifest_cannot_point_out_of_its_folder(toy):
    manifest = json.loads((toy / "manifest.json").read_text())
    for path in ("../secret", "/etc/passwd", None, 3):
        manifest["shards"] = [{"path": path}]
        (toy / "manifest.json").write_text(json.dumps(manifest))
        assert "lists a shard at" in refusal(toy)


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no shards here"):
        inspect.summarise(tmp_path)


# ---- one clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [("toy_a#0", "toy_a#0"), ("b#", "toy_b#1"), ("1", "toy_b#1"), ("val:0", "toy_c#0"), ("toy_c", "toy_c#0")],
)
def test_clip_by_id_number_part_or_split(toy, asked, found):
    assert timeline.find_clip(toy, asked).row["clip_id"] == found


@pytest.mark.parametrize("asked", ["toy", "0", "nowhere", "val:toy_a", "", ".*"])
def test_an_unclear_clip_lists_candidates(toy, asked):
    with pytest.raises(InputError, match=r"(train|val):toy_[abc]#"):
        timeline.timeline(toy, asked)


def test_timeline_reads_without_colour(toy):
    lines = [line.rstrip() for line in text_of(timeline.timeline(toy, "toy_a#0")).splitlines()]
    at = lines.index("frame    ╷193 1:36.5")
    assert lines[at + 1 : at + 4] == [
        "turn     2-4   6",  # 5 begins one frame later and has no room
        "speaking ██··──██·─",
        "DST      █─··───█·─",
    ]
    assert any(line.startswith("frames    193..203, 10 at 2 fps, 1:36.5 to 1:41.5") for line in lines)


def test_timeline_lists_turns_in_order_with_the_state_they_lead_to(toy):
    text = text_of(timeline.timeline(toy, "toy_a#0"))
    wanted = [
        "1:36.5  193..195  user        I want to build it.",
        "S1→start",
        "state: in progress S1 | not started S2 S3",
        "Great, take the base.",
        "S1→complete, S2→start",
        "state: completed S1 | in progress S2 | not started S3",
        "Too late.",
        "(outside the clip: labels nothing)",
    ]
    places = [text.index(piece) for piece in wanted]
    assert places == sorted(places)


def test_timeline_obeys_nothing_in_the_data(toy):
    text = text_of(timeline.timeline(toy, "toy_a#0"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<b>&amp; \ufffd[2J" in text  # shown as it is, and not as markup of rich's


def test_long_clips_wrap_and_very_long_ones_are_condensed(tmp_path):
    clips = [
        make_clip("c1200", "0" * 1199 + "1", "." * 1200),
        make_clip("c9000", "0" * 8999 + "1", "." * 9000),
    ]
    folder = write_folder(tmp_path, {"train": clips})
    long, longer = (text_of(timeline.timeline(folder, name)) for name in ("c1200", "c9000"))
    assert long.count("speaking ") == 15  # wrapped rows of 80
    assert "one column" not in long
    assert "one column = 6 frames, the strongest label shown" in longer
    assert longer.count("speaking ") == 19
    assert longer.count("█") == 1 + 1  # the one positive frame is still seen; and the legend


def test_replay_starts_from_the_initial_state():
    row = {
        "steps": [{"id": "S1", "name": ""}, {"id": "S2", "name": ""}],
        "initial_state": [{"id": "S1", "state": "completed"}],
        "turns": [
            turn("user", ""),
            turn("DST_UPDATE", "", updates=[("S2", "start")]),
            turn("DST_UPDATE", "", updates=[("S2", "pause")]),
        ],
    }
    states = [{"S1": "completed", "S2": s} for s in ("not_started", "in_progress", "paused")]
    assert timeline.states_of(row)[1:] == states


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (96.5, "1:36.5"), (59.96, "1:00"), (3600, "1:00:00"), (3723.4, "1:02:03.4")],
)
def test_clock(seconds, text):
    assert terminal.clock(seconds) == text


# ---- the page ----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def page_of(folder):
    out = folder.parent / "page.html"
    inspect_html.write_page(folder, out)
    page = out.read_text()
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return page, json.loads(data)


def test_page_carries_the_numbers_and_the_clips(toy):
    _, data = page_of(toy)
    assert [s["name"] for s in data["splits"]] == ["train", "val"]
    assert data["splits"][0]["heads"]["speaking"]["gaps"] == [0, 0, 1, 0, 0, 0, 0, 0, 0]  # one of 2.0 s
    assert [c["id"] for c in data["clips"]] == ["toy_a#0", "toy_b#1", "toy_c#0"]
    assert data["clips"][0]["labels"] == "abi2e2bai" + "e"
    assert data["clips"][0]["turns"][4][5] == [["S1", "complete"], ["S2", "start"]]
    assert len(data["hazards"]) == 3


def test_hostile_text_stays_text(tmp_path):
    splits = toy_splits()
    splits["train"].append(make_clip(HOSTILE, "01", "00", recording=HOSTILE))
    benign, _ = page_of(write_folder(tmp_path / "a" / "out", {"train": [make_clip("c", "01", "00")]}))
    page, data = page_of(write_folder(tmp_path / "b" / "out", splits))
    assert Tags(page).found == Tags(benign).found
    assert page.count("<script") == 2
    assert data["clips"][0]["turns"][5][1].startswith("</script><script>alert(1)</script><!-- <b>&amp; ")


def test_page_is_self_contained(toy):
    page, _ = page_of(toy)
    loads = [(tag, attrs) for tag, attrs in Tags(page).found if {"src", "href", "data", "srcset"} & set(attrs)]
    assert loads == []
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page


def test_content_policy_allows_the_pages_own_script_alone(toy):
    page, _ = page_of(toy)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "unsafe" not in page.split("<style>")[0]


def test_many_clips_are_thinned_out_evenly_over_splits():
    picked = inspect_html.spread([list(range(1000)), list(range(3)), list(range(50))], 20)
    assert [len(p) for p in picked] == [9, 3, 8]
    assert picked[0] == [i * 1000 // 9 for i in range(9)]
    assert inspect_html.spread([[1], [2]], 1) in ([[1], []], [[], [2]])


def test_page_size_is_bounded(tmp_path, monkeypatch):
    talk = [turn("assistant", "word " * 4000, 0, 1, 0.1)] * 1000
    clips = [make_clip(f"c{i}", "01" * 20_000, "." * 40_000, turns=talk) for i in range(4)]
    folder = write_folder(tmp_path / "out", {"train": clips})
    monkeypatch.setattr(inspect_html, "MAX_BYTES", 500_000)
    page, data = page_of(folder)
    assert len(page) < 600_000
    clip = data["clips"][0]
    assert (len(clip["turns"]), clip["more_turns"], clip["frames"]) == (400, 600, 40_000)
    assert len(clip["labels"]) == 20_000


def test_page_is_written_whole_or_not_at_all(toy, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        inspect_html.write_page(toy, out)
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out", "page.html"] or len(list(tmp_path.iterdir())) == 2


def test_a_damaged_shard_is_found_before_the_page_is_drawn(toy, tmp_path):
    (toy / FRAMES_0).write_bytes(b"")
    with pytest.raises(InputError, match="damaged or edited"):
        inspect_html.write_page(toy, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("speaking", "dst", "code"),
    [("", "", ""), ("111", "000", "b3"), ("10.", "01.", "bdi"), ("..", "00", "h2")],
)
def test_run_lengths(speaking, dst, code):
    assert inspect_html.run_lengths(labels(speaking), labels(dst)) == code


@pytest.mark.parametrize(
    ("counts", "median"), [({}, None), ({3.0: 1}, 3.0), ({1.0: 1, 9.0: 1}, 1.0), ({1.0: 1, 2.0: 5}, 2.0)]
)
def test_weighted_median(counts, median):
    assert summary.weighted_median(counts) == median
