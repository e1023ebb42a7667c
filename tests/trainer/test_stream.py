"""`stream`: the numbers of the self-fed evaluation, hours in bounded memory, val's thresholds, mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, turn, write_frames, write_shards
from PIL import Image
from small_run import clip, go
from test_evaluate import write_splits

from pipeline.errors import InputError, NotFiniteError
from trainer.checkpoint import load_run, run_hash
from trainer.cli import main
from trainer.evaluate import evaluate
from trainer.frame_source import PixelFrames
from trainer.live.rollout import self_fed
from trainer.live.session import DecodingConfig
from trainer.live.stream import Stream, live_of
from trainer.live.task import Task, find_task, read_task
from trainer.live.video_input import Seen

SHARED = Path(__file__).parents[3] / "shared" / "real"
THRESHOLDS = ["--threshold", "speaking=-1,dst_update=-1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("stream") / "data")


@pytest.fixture(scope="module")
def run(data):
    go(data, data.parent / "run")
    return data.parent / "run"


@pytest.fixture(scope="module")
def evaluated(run, data):
    evaluate(run, data)
    return run


@pytest.fixture(autouse=True)
def nobody_types(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def streamed(capsys, *args) -> list[dict]:
    """What `stream --json` prints."""
    capsys.readouterr()
    assert main(["stream", *map(str, args), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def frame(number: int, seed: int = 0, side: int = 64) -> Seen:
    pixels = np.random.default_rng([seed, number]).integers(0, 256, (3, side, side), np.uint8)
    return Seen(number, number / 2, pixels, Image.new("RGB", (8, 8)), 0)


# ---- the same numbers as evaluation --------------------------------------------------------------------


def test_a_streamed_clip_has_the_logits_and_texts_of_the_self_fed_evaluation(run, data, capsys):
    loaded = load_run(run)
    live = DecodingConfig({"speaking": -1.0, "dst_update": -1.0})
    clips = [clip(i, "test") for i in range(3)]
    frames = PixelFrames(data / "frames-on-disk", 64)
    scored = list(self_fed(loaded.model, loaded.tokens, clips, frames, loaded.config, live))
    assert sum(said is not None for one in scored for said in one.said) >= 3
    for i, one in enumerate(scored):
        video = data / "frames-on-disk" / f"test-v{i}.arrow"
        told = streamed(capsys, run, video, "--task", data, "--clip", f"test:{i}", *THRESHOLDS)
        assert [moment["frame"] for moment in told] == list(range(one.clip.num_frames))
        for head, logits in one.logits.items():
            assert np.abs(np.array([moment["logits"][head] for moment in told]) - logits).max() < 1e-4
        assert [moment["said"] for moment in told] == one.said
        made = [None if m["updates"] is None else tuple(map(tuple, m["updates"])) for m in told]
        assert made == one.updates
        assert [moment["heard"] for moment in told][:3] == [[], ["What now, <image>?"], []]


def test_across_rebuilt_contexts_too(run):
    loaded = load_run(run)
    loaded = replace(loaded, config=replace(loaded.config, max_tokens=76))
    example = clip_example([turn("user", "What now, <image>?", 104, 105)], 100, 90, goal="A toy")
    live = DecodingConfig({"speaking": -0.5, "dst_update": -0.5}, most_text=4)
    frames = NoisyFrames()
    [scored] = self_fed(loaded.model, loaded.tokens, [example], frames, loaded.config, live)
    with Stream(loaded, example, live) as stream:
        moments = [
            stream.see(
                Seen(n, n / 2, frames.load(example, n, n + 1)[0], Image.new("RGB", (8, 8)), 0),
                ["What now, <image>?"] if n == 104 else [],
            )
            for n in range(100, 190)
        ]
    assert sum(moment.started_over for moment in moments) > 1
    assert [moment.said for moment in moments] == scored.said
    for head, logits in scored.logits.items():
        assert np.abs(np.array([moment.logits[head] for moment in moments]) - logits).max() < 1e-4


def test_a_part_of_a_video_is_streamed_with_its_own_user(run, tmp_path, capsys):
    turns = [turn("user", "What now?", 8, 9), turn("user", "And then?", 30, 31)]
    example = clip_example(turns, 5, 12, clip_id="part", video="v")
    data = write_shards(tmp_path / "data", {"test": [example]}, frames_root=tmp_path)
    shades = [np.full((64, 64, 3), 8 * i, np.uint8) for i in range(30)]
    write_frames(tmp_path / "v.arrow", shades)
    found = streamed(capsys, run, tmp_path / "v.arrow", "--task", data, "--clip", "part", *THRESHOLDS)
    assert [moment["frame"] for moment in found] == list(range(5, 17))
    assert [moment["frame"] for moment in found if moment["heard"]] == [8]
    write_frames(tmp_path / "v.arrow", shades[:10])
    assert (
        main(["stream", str(run), str(tmp_path / "v.arrow"), "--task", str(data), "--clip", "part", *THRESHOLDS]) == 1
    )
    assert "v.arrow: ends at frame 9, but its clip at 16; get the whole file" in capsys.readouterr().err


def test_lines_of_skipped_frames_are_heard_too():
    task = Task(clip_example([]), range(9), {1: ["a"], 2: ["b"], 4: ["c"]})
    assert task.heard(replace(frame(3), skipped=2)) == ["a", "b"]
    assert task.heard(frame(4)) == ["c"]


def test_a_probability_makes_up_for_the_sampling(run):
    loaded = load_run(run)
    stream = Stream(
        replace(loaded, info=loaded.info | {"neg_rate": 0.5}),
        read_task(None, "v", None, 2),
        DecodingConfig({"speaking": 0.0}),
    )
    assert stream.probability(0.0) == pytest.approx(1 / 3)  # odds 1 among one half of the silence: 1 to 2 in truth


def test_the_model_is_as_before_afterwards(run, monkeypatch):
    loaded = load_run(run)
    before = loaded.model.vlm.config.text_config._attn_implementation
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    with Stream(loaded, read_task(None, "v", None, 2), DecodingConfig({"speaking": 0.0, "dst_update": 0.0})) as stream:
        stream.see(frame(0))
    assert threads == [1, 3]
    assert loaded.model.vlm.config.text_config._attn_implementation == before == "packed_attention"
    assert not torch.is_inference_mode_enabled()


# ---- for hours -----------------------------------------------------------------------------------------


def test_memory_and_positions_are_bounded_and_the_state_outlives_what_is_forgotten(run, monkeypatch):
    loaded = load_run(run)
    loaded.model.vlm.config.text_config.max_position_embeddings = 150
    task = clip_example([], 0, 1, goal="A toy")
    live = DecodingConfig({"speaking": np.inf, "dst_update": -np.inf}, refractory_s=20, most_text=8)
    texts = iter(["S1->start", "S1->complete, S2->start", *["S9->start"] * 99])

    def write(self, role):
        ids = self.tokens.encode(next(texts))
        self._unread.append([self.tokens.marker[role], *ids, self.tokens.end])
        return ids
        yield

    monkeypatch.setattr("trainer.live.session.Context._write", write)
    with Stream(loaded, task, live) as stream:
        moments = [stream.see(frame(number)) for number in range(900)]
        slabs = stream._engine._cache._slabs
        assert {slab.shape[2] for layer in slabs for slab in layer} == {150}
        assert len(stream._context._held) < 150
    assert max(moment.tokens for moment in moments) <= 150
    assert sum(moment.started_over for moment in moments) > 5
    assert [moments[i].state for i in (0, 39, 40, 899)] == [
        {"S1": "in_progress", "S2": "not_started"},
        {"S1": "in_progress", "S2": "not_started"},
        {"S1": "completed", "S2": "in_progress"},
        {"S1": "completed", "S2": "in_progress"},
    ]
    assert moments[40].updates == (("S1", "complete"), ("S2", "start"))
    assert moments[40].dst_text == "S1->complete, S2->start"


def test_a_user_who_goes_on_and_on_is_cut_and_seen_to_be(run):
    loaded = load_run(run)
    with Stream(
        loaded, read_task(None, "v", None, 2), DecodingConfig({"speaking": np.inf, "dst_update": np.inf})
    ) as stream:
        moment = stream.see(frame(0), ["What now? " * 200, "and then?"])
        assert moment.tokens < loaded.config.max_tokens / 2
    [heard] = moment.heard
    assert heard.startswith("What now? What now?")
    assert heard.endswith("…")


def test_scores_that_are_no_numbers_stop_it(run):
    loaded = load_run(run)
    torch.nn.init.constant_(loaded.model.heads.speak.bias, torch.nan)
    with (
        Stream(loaded, read_task(None, "v", None, 2), DecodingConfig({"speaking": 0.0, "dst_update": 0.0})) as stream,
        pytest.raises(NotFiniteError, match="frame 7: the scores are not finite"),
    ):
        stream.see(frame(7))


# ---- thresholds ----------------------------------------------------------------------------------------


def test_thresholds_and_the_refractory_time_are_those_of_the_evaluation(evaluated):
    chosen = json.loads((evaluated / "evaluation-test" / "metrics.json").read_text())["thresholds"]["event"]
    for place in (evaluated, evaluated / "last"):
        assert live_of(place, {}, None) == DecodingConfig({"dst_update": np.inf, **chosen}, 2.0)
    mixed = live_of(evaluated, {"speaking": 3.0}, 0.5)
    assert (mixed.thresholds, mixed.refractory_s) == (chosen | {"speaking": 3.0}, 0.5)
    mixed = live_of(evaluated, {"dst_update": 4.0}, None)
    assert mixed.thresholds == {"speaking": chosen["speaking"], "dst_update": 4.0}


def test_a_run_without_thresholds_or_with_those_of_another_checkpoint_is_refused(evaluated, tmp_path, capsys):
    shutil.copytree(evaluated / "last", tmp_path / "run" / "last")
    with pytest.raises(InputError, match=r"was not evaluated, .* run prospect-dst evaluate .* or give --threshold"):
        live_of(tmp_path / "run", {}, None)
    shutil.copytree(evaluated / "evaluation-test", tmp_path / "run" / "evaluation-test")
    assert "speaking" in live_of(tmp_path / "run", {}, None).thresholds
    metrics = tmp_path / "run" / "evaluation-test" / "metrics.json"
    edited = json.loads(metrics.read_text()) | {"model": "0" * 64}
    metrics.write_text(json.dumps(edited))
    with pytest.raises(InputError, match=r"metrics.json is of another checkpoint; run prospect-dst evaluate"):
        live_of(tmp_path / "run", {}, None)
    silent = json.loads(metrics.read_text()) | {"model": run_hash(tmp_path / "run")}
    silent["thresholds"]["event"] = {}
    metrics.write_text(json.dumps(silent))
    with pytest.raises(InputError, match=r"metrics.json has no threshold for speaking: nobody speaks in val, or"):
        live_of(tmp_path / "run", {}, None)
    assert live_of(tmp_path / "run", {"speaking": 3.0}, None) == DecodingConfig(
        {"speaking": 3.0, "dst_update": np.inf}, 2.0
    )
    with pytest.raises(InputError, match="threshold said=1: expected a logit of one of speaking, dst_update"):
        live_of(evaluated, {"said": 1.0}, None)


# ---- tasks ---------------------------------------------------------------------------------------------


def told(tmp_path, content) -> Path:
    (tmp_path / "task.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "task.json"


def test_a_task_is_told_by_names_by_ids_or_by_a_clip_as_it_is(tmp_path):
    expected = (("S1", "Boil water"), ("S2", "Pour"))
    by_names = read_task(told(tmp_path, {"goal": "Tea", "steps": ["Boil water", "Pour"]}), "v", None, 2)
    assert (by_names.goal, by_names.steps, by_names.initial_state) == ("Tea", expected, ())
    steps = [{"id": i, "name": name, "start_ts": 0} for i, name in expected]
    conversation = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "No."},
    ]
    one = {
        "id": "a",
        "inferred_goal": "Tea",
        "dst": steps,
        "initial_dst_state": {"S1": "completed"},
        "conversation": conversation,
    }
    for content, name in (([one], None), ([one, one | {"id": "b"}], "a"), ([one | {"id": "b"}, one], "1")):
        task = read_task(told(tmp_path, content), "v", name, 2)
        assert (task.goal, task.steps, task.initial_state) == ("Tea", expected, (("S1", "completed"),))
        assert not task.turns


def test_a_generated_clip_tells_no_future_state_and_may_list_its_recipe(tmp_path):
    clip = {
        "inferred_knowledge": ["Boil", "Pour"],
        "dst": {"steps": [{"id": "S1", "name": "Boil water"}]},
        "initial_dst_state": {"S1": "completed"},  # the state at the clip's end
        "conversation": [{"role": "DST_UPDATE", "content": [{"id": "S1", "transition": "start"}]}],
    }
    task = read_task(told(tmp_path, clip), "v", None, 2)
    assert (task.knowledge, task.steps, task.initial_state) == ("Boil\nPour", (("S1", "Boil water"),), ())


@pytest.mark.parametrize(
    ("content", "clip", "message"),
    [
        ("{", None, "task.json: not JSON"),
        ([], None, "task.json: 0 clips fit"),
        ([{"id": "a"}, {"id": "b"}], None, "task.json: 2 clips fit, expected one; name it with --clip, e.g. of a, b"),
        ([{"id": "a"}], "c", "task.json: 0 clips fit"),
        ("3", None, "task.json: found '3', expected an object"),
        ({"steps": "boil"}, None, "steps: found 'boil', expected a list"),
        ({"steps": [3]}, None, "steps.1: found 3, expected a name, or an id and a name"),
        ({"steps": [{"id": "S1"}]}, None, "steps.1"),
        ({"steps": [{"id": "S1", "name": "a"}, {"id": "S1", "name": "b"}]}, None, "steps: an id twice"),
        ({"steps": ["a"], "initial_state": {"S2": "completed"}}, None, "initial_state: expected an object of its st"),
        ({"steps": ["a"], "initial_state": {"S1": "done"}}, None, "initial_state"),
        ({"goal": 3}, None, "goal: found 3, expected text"),
    ],
)
def test_a_task_that_says_something_else_is_the_users_to_mend(tmp_path, content, clip, message):
    with pytest.raises(InputError, match=message):
        read_task(told(tmp_path, content), "v", clip, 2)


def test_a_line_per_clip_is_read_and_text_that_is_none_is_refused(tmp_path):
    lines = "\n".join(json.dumps({"id": i, "inferred_goal": f"Tea {i}"}) for i in "ab")
    assert read_task(told(tmp_path, lines), "v", "b", 2).goal == "Tea b"
    lines = '{"id": "a", "goal": "Tea\u2028for\x85two"}\r\n{"id": "b"}\r\n'  # ends of lines to Python, not to JSON
    assert read_task(told(tmp_path, lines), "v", "a", 2).goal == "Tea\u2028for\x85two"
    with pytest.raises(InputError, match=r"task.json: not JSON"):
        read_task(told(tmp_path, '{"goal": "\\ud800"}'), "v", None, 2)


def test_what_does_not_go_together_is_refused(data):
    for path, name, video, fps, message in (
        (None, "a", "v.mp4", None, "clip 'a': of what"),
        (data, "test:0", "v.mp4", 4.0, "has 2 frames/s, not 4; leave --fps out"),
        (data, "test:0", "0", None, "camera 0: a clip of .* is a part of a video"),
    ):
        with pytest.raises(InputError, match=message):
            find_task(path, name, video, fps, 2.0)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_clip_is_a_task():
    task = read_task(SHARED / "prospect_clip.json", "v", None, 2)
    assert task.goal == "Assembling a Toy Roller with Chassis, Wheels, and Cabin"
    assert [step for step, _ in task.steps] == ["S1", "S2", "S3", "S4", "S5", "S6"]


# ---- from the command line -----------------------------------------------------------------------------


def write_video(path: Path, seconds: float = 4.0, fps: int = 30, side: int = 96, options=None) -> None:
    """h264 that gets brighter."""
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for i in range(int(seconds * fps)):
            picture = np.full((side, side, 3), 2 * i % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))


def test_a_video_at_30_fps_runs_start_to_end_and_is_kept(run, tmp_path, capsys):
    write_video(tmp_path / "v.mp4")
    found = streamed(capsys, run, tmp_path / "v.mp4", *THRESHOLDS, "--html", tmp_path / "v.html")
    assert [moment["frame"] for moment in found] == list(range(8))
    assert [moment["time_s"] for moment in found] == [i / 2 for i in range(8)]
    assert all(0 < moment["probabilities"]["speaking"] < 1 for moment in found)
    assert (tmp_path / "v.html").stat().st_size > 1000


def test_a_recording_never_replaces_the_video(run, tmp_path, capsys):
    write_video(tmp_path / "v.mp4", seconds=1)
    before = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "v.mp4")
    (tmp_path / "sub").mkdir()
    for video, kept in (("v.mp4", "v.mp4"), ("v.mp4", "sub/../v.mp4"), ("link.mp4", "v.mp4")):
        assert main(["stream", str(run), f"{tmp_path}/{video}", *THRESHOLDS, "--html", f"{tmp_path}/{kept}"]) == 2
        assert "names a file that is read" in capsys.readouterr().err
    assert (tmp_path / "v.mp4").read_bytes() == before


def test_a_recording_replaces_nothing_that_is_read_and_no_device(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "0.png")
    os.mkfifo(tmp_path / "pipe.html")
    task = told(tmp_path, {"goal": "Tea"})
    for more, message in (
        (["--task", task, "--html", task], "names a file that is read"),
        (["--html", tmp_path / "images" / "0.png"], "among the images that are read"),
        (["--html", tmp_path / "pipe.html"], "no regular file"),
    ):
        assert main(["stream", str(run), str(tmp_path / "images"), *THRESHOLDS, *map(str, more)]) == 2
        assert message in capsys.readouterr().err
    assert main(["stream", str(run), str(tmp_path / "images"), *THRESHOLDS, "--task", str(tmp_path / "pipe.html")]) == 1
    assert "no such file, or none to be read" in capsys.readouterr().err


def test_a_video_that_lost_its_end_says_so_after_what_is_there(run, tmp_path, capsys):
    write_video(tmp_path / "v.mp4", seconds=8, options={"movflags": "faststart"})
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(content[: len(content) * 2 // 3])
    assert main(["stream", str(run), str(tmp_path / "v.mp4"), *THRESHOLDS, "--json"]) == 1
    out, err = capsys.readouterr()
    assert 4 <= len(out.splitlines()) < 14
    assert re.search(r"v.mp4: ends after [\d.]+ of 8 seconds; get the whole file", err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stream_that_is_stopped_keeps_its_recording(run, data, tmp_path, monkeypatch, number, status):
    see = Stream.see

    def stopped(self, seen, heard=()):
        if seen.frame == 3:
            os.kill(os.getpid(), number)
        return see(self, seen, heard)

    monkeypatch.setattr(Stream, "see", stopped)
    before = signal.getsignal(signal.SIGTERM)
    video = data / "frames-on-disk" / "test-v0.arrow"
    args = ["--html", tmp_path / "kept.html", *THRESHOLDS]
    assert main(["stream", str(run), str(video), *map(str, args)]) == status
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.html"]


def test_the_user_s_lines_are_heard_in_time(run, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "v.mp4", seconds=3)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n@1.2 and now?\n"))
    found = streamed(capsys, run, tmp_path / "v.mp4", *THRESHOLDS, "--stdin")
    assert [moment["heard"] for moment in found] == [["hello"], [], [], ["and now?"], [], []]
    monkeypatch.setattr("sys.stdin", io.StringIO("of a shell's loop\n"))
    assert not any(moment["heard"] for moment in streamed(capsys, run, tmp_path / "v.mp4", *THRESHOLDS))
    assert sys.stdin.read() == "of a shell's loop\n"


def test_without_json_events_are_told_in_words(run, data, capsys):
    video = data / "frames-on-disk" / "test-v0.arrow"
    assert main(["stream", str(run), str(video), "--task", str(data), "--clip", "test:0", *THRESHOLDS]) == 0
    out = capsys.readouterr().out
    assert "What now, <image>?" in out
    assert "12 frames" in out


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_video_runs_start_to_end(run, capsys):
    found = streamed(
        capsys, run, SHARED / "drive.mp4", "--task", SHARED / "prospect_clip.json", *THRESHOLDS, "--max-tokens", 600
    )
    assert len(found) == 33
    assert set(found[-1]["state"]) == {"S1", "S2", "S3", "S4", "S5", "S6"}


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (lambda folder: (folder / "v.mp4").write_bytes(b"no video" * 999), [], "v.mp4: not a video that can be read"),
        (lambda folder: (folder / "v.mp4").unlink(), [], "v.mp4: no such file or folder"),
        (lambda folder: None, ["--task", "nowhere.json"], "nowhere.json: "),
        (lambda folder: None, ["--task", "."], ".: a folder; say which of its clips is meant: --clip test:0"),
        (lambda folder: None, ["--fps", "0"], "fps 0, expected 0.01 to 1000"),
        (lambda folder: None, ["--refractory-s", "-1"], "refractory_s is -1"),
    ],
)
def test_a_mistake_gives_one_line(run, tmp_path, capsys, monkeypatch, change, args, message):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "v.mp4", seconds=1)
    change(tmp_path)
    assert main(["stream", str(run), "v.mp4", *THRESHOLDS, *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("prospect-dst: ")
    assert message in err
    assert err.count("\n") == 1
