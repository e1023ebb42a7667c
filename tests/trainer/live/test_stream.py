"""`stream`: the numbers of free-running evaluation, bounded memory, val's thresholds, tasks, the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, turn
from live_model import NEVER, write_video
from PIL import Image
from small_run import clip

from pipeline.errors import InputError, NotFiniteError
from trainer.checkpoint import load_run
from trainer.cli import main
from trainer.evaluate import evaluate
from trainer.frame_source import PixelFrames
from trainer.live.rollout import free_running
from trainer.live.session import DecodingConfig, Session
from trainer.live.stream import Stream, decoding_config
from trainer.live.task import Task, find_task, read_task
from trainer.live.video_input import VideoFrame

SHARED = Path(__file__).parents[4] / "shared" / "real"
THRESHOLDS = ["--threshold", "speaking=-1,dst_update=-1"]


@pytest.fixture(scope="module")
def data(splits):
    return splits


@pytest.fixture(scope="module")
def run(splits_run):
    return splits_run


@pytest.fixture(autouse=True)
def _nobody_types(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def streamed(capsys, *args) -> list[dict]:
    """What `stream --json` prints."""
    capsys.readouterr()
    assert main(["stream", *map(str, args), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def frame(number: int, pixels=None) -> VideoFrame:
    pixels = NoisyFrames().load(clip_example([]), number, number + 1)[0] if pixels is None else pixels
    return VideoFrame(number, number / 2, pixels, Image.new("RGB", (8, 8)))


# ---- the same numbers as evaluation --------------------------------------------------------------------


def test_a_streamed_clip_has_the_logits_and_texts_of_the_free_running_evaluation(run, data, capsys):
    loaded = load_run(run)
    source = PixelFrames(data / "frames-on-disk", 64)
    decoding = DecodingConfig({"speaking": -1.0, "dst_update": -1.0})
    clips = [clip(i, "test") for i in range(2)]
    scored = list(free_running(loaded.model, loaded.tokens, clips, source, loaded.config, decoding))
    assert sum(text is not None for one in scored for text in one.said) >= 2
    for i, one in enumerate(scored):
        path = data / "frames-on-disk" / f"test-v{i}.arrow"
        frames = streamed(capsys, run, path, "--task", data, "--clip", f"test:{i}", *THRESHOLDS)
        assert [f["frame"] for f in frames] == list(range(one.clip.num_frames))
        for head, logits in one.logits.items():
            assert np.abs(np.array([f["logits"][head] for f in frames]) - logits).max() < 1e-4
        assert [f["assistant_text"] for f in frames] == one.said
        updates = [None if f["updates"] is None else tuple(map(tuple, f["updates"])) for f in frames]
        assert updates == one.updates
        assert [f["user_texts"] for f in frames][:3] == [[], ["What now, <image>?"], []]


@pytest.mark.parametrize(("max_tokens", "question"), [(76, "What now, <image>?"), (100, "What now? " * 9)])
def test_across_rebuilt_contexts_too_and_with_a_text_that_hardly_fits(run, max_tokens, question):
    loaded = load_run(run)
    loaded = replace(loaded, config=replace(loaded.config, max_tokens=max_tokens))
    example = clip_example([turn("user", question, 104, 105)], 100, 90, goal="A toy")
    decoding = DecodingConfig({"speaking": -0.5, "dst_update": -0.5}, max_text=4)
    [scored] = free_running(loaded.model, loaded.tokens, [example], NoisyFrames(), loaded.config, decoding)
    with Stream(loaded, example, decoding) as stream:
        frames = [stream.step(frame(n), [question] if n == 104 else []) for n in range(100, 190)]
    assert sum(f.started_over for f in frames) > 1
    assert [f.assistant_text for f in frames] == scored.said
    for head, logits in scored.logits.items():
        assert np.abs(np.array([f.logits[head] for f in frames]) - logits).max() < 1e-4


def test_texts_before_skipped_frames_are_read_and_probabilities_corrected_for_the_sampling(run):
    task = Task(clip_example([]), range(9), {1: ["a"], 2: ["b"], 4: ["c"]})
    assert (task.texts_before(3, skipped=2), task.texts_before(4, skipped=0)) == (["a", "b"], ["c"])
    loaded = load_run(run)
    stream = Stream(replace(loaded, info=loaded.info | {"neg_rate": 0.5}), read_task(None, "v", None, 2), NEVER)
    assert stream.probability(0.0) == pytest.approx(1 / 3)  # odds 1 among one half of the silence: 1 to 2 in truth


def test_memory_is_bounded_and_the_state_outlives_the_context(run, monkeypatch):
    loaded = load_run(run)
    loaded.model.vlm.config.text_config.max_position_embeddings = 150
    texts = iter(["S1->start", "S1->complete, S2->start", *["S9->start"] * 99])
    write = Session._write
    monkeypatch.setattr(Session, "_write", lambda self, role, text: write(self, role, next(texts)))
    decoding = DecodingConfig({"speaking": np.inf, "dst_update": -np.inf}, refractory_s=20, max_text=8)
    pixels = frame(0).pixels
    with Stream(loaded, clip_example([], 0, 1, goal="A toy"), decoding) as stream:
        frames = [stream.step(frame(number, pixels)) for number in range(400)]
        assert {slab.shape[2] for layer in stream._engine._cache._slabs for slab in layer} == {150}
        assert len(stream._session._frames) < 150
    assert max(f.tokens for f in frames) <= 150
    assert sum(f.started_over for f in frames) > 2
    assert [frames[i].state for i in (0, 40, 399)] == [
        {"S1": "in_progress", "S2": "not_started"},
        {"S1": "completed", "S2": "in_progress"},
        {"S1": "completed", "S2": "in_progress"},
    ]
    assert frames[40].updates == (("S1", "complete"), ("S2", "start"))
    assert frames[40].dst_text == "S1->complete, S2->start"


def test_a_user_text_over_the_context_is_cut_and_a_logit_that_is_not_finite_stops_it(run):
    loaded = load_run(run)
    with Stream(loaded, read_task(None, "v", None, 2), NEVER) as stream:
        output = stream.step(frame(0), ["What now? " * 200, "and then?"])
        assert output.tokens <= loaded.config.max_tokens
        assert re.fullmatch("What now[?] What now[?] .*…", *output.user_texts)
        torch.nn.init.constant_(loaded.model.heads.speak.bias, torch.nan)
        with pytest.raises(NotFiniteError, match="frame 7: the scores are not finite"):
            stream.step(frame(7))


def test_thresholds_are_the_evaluation_s_or_the_user_s_and_never_another_checkpoint_s(run, data, tmp_path):
    shutil.copytree(run / "last", tmp_path / "run" / "last")
    with pytest.raises(InputError, match=r"was not evaluated, .* run prospect-dst evaluate .* or give --threshold"):
        decoding_config(tmp_path / "run", {}, None)
    evaluate(tmp_path / "run", data, live=False)
    path = tmp_path / "run" / "evaluation-test" / "metrics.json"
    metrics = json.loads(path.read_text())
    chosen = metrics["thresholds"]["event"]
    for place in (tmp_path / "run", tmp_path / "run" / "last"):
        assert decoding_config(place, {}, None) == DecodingConfig({"dst_update": np.inf, **chosen}, 2.0)
    mixed = decoding_config(tmp_path / "run", {"dst_update": 3.0}, 0.5)
    assert mixed == DecodingConfig({"speaking": chosen["speaking"], "dst_update": 3.0}, 0.5)
    with pytest.raises(InputError, match="threshold said=1: expected a logit of one of speaking, dst_update"):
        decoding_config(tmp_path / "run", {"said": 1.0}, None)
    for changed, message in (
        ({"model": "0" * 64}, r"metrics.json is of another checkpoint; run prospect-dst evaluate"),
        ({"thresholds": {"event": {}}}, r"metrics.json has no threshold for speaking: nobody speaks in val, or"),
    ):
        path.write_text(json.dumps(metrics | changed))
        with pytest.raises(InputError, match=message):
            decoding_config(tmp_path / "run", {}, None)
    own = decoding_config(tmp_path / "run", {"speaking": 3.0}, None)
    assert own == DecodingConfig({"speaking": 3.0, "dst_update": np.inf}, 2.0)


# ---- tasks ---------------------------------------------------------------------------------------------


def task_file(tmp_path: Path, content) -> Path:
    (tmp_path / "task.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "task.json"


STEPS = (("S1", "Boil water"), ("S2", "Pour"))


def test_a_task_is_given_by_names_by_ids_or_by_a_clip(tmp_path):
    by_names = read_task(task_file(tmp_path, {"goal": "Tea", "steps": ["Boil water", "Pour"]}), "v", None, 2)
    assert (by_names.goal, by_names.steps, by_names.initial_state) == ("Tea", STEPS, ())
    one = {"id": "a", "inferred_goal": "Tea", "inferred_knowledge": ["Boil", "Pour"],
           "dst": [{"id": i, "name": name, "start_ts": 0} for i, name in STEPS],
           "initial_dst_state": {"S1": "completed"}, "conversation": [{"role": "user", "content": "Hi"}]}  # fmt: skip
    lines = "".join(json.dumps(one | {"id": i}) + "\r\n" for i in ("b\u2028", "a"))
    for content, name in (([one], None), ([one | {"id": "b"}, one], "1"), (lines, "a")):
        task = read_task(task_file(tmp_path, content), "v", name, 2)
        assert (task.goal, task.knowledge, task.steps) == ("Tea", "Boil\nPour", STEPS)
        assert task.initial_state == (("S1", "completed"),)
        assert not task.turns
    updates = [{"role": "DST_UPDATE", "content": [{"id": "S1", "transition": "start"}]}]
    late = task_file(tmp_path, one | {"conversation": updates})  # generators write the state at the clip's end
    assert read_task(late, "v", None, 2).initial_state == ()


@pytest.mark.parametrize(
    ("content", "clip", "message"),
    [
        ("{", None, "task.json: not JSON"),
        ([{"id": "a"}, {"id": "b"}], None, "task.json: 2 clips fit, expected one; name it with --clip, e.g. a, b"),
        ("3", None, "task.json: 0 clips fit, expected one; give an object with goal and steps"),
        ({"steps": [{"id": "S1"}]}, None, r"missing required field `name` - at `\$.steps\[0\]`"),
        ({"steps": [{"id": "S1", "name": "a"}, {"id": "S1", "name": "b"}]}, None, "steps: two have the same id"),
        ({"steps": ["a"], "initial_state": {"S2": "completed"}}, None, "initial_state: 'S2' is none of the steps"),
        ({"steps": ["a"], "initial_state": {"S1": "done"}}, None, r"Invalid enum value 'done' - at `\$.initial_state"),
    ],
)
def test_a_task_of_another_form_is_an_error(tmp_path, content, clip, message):
    with pytest.raises(InputError, match=message):
        read_task(task_file(tmp_path, content), "v", clip, 2)


def test_what_does_not_go_together_is_refused(data):
    for path, name, where, fps, message in (
        (None, "a", "v.mp4", None, "clip 'a': --clip needs --task"),
        (data, None, "v.mp4", None, "is a folder; name one of its clips: --clip test:0"),
        (data, "test:0", "v.mp4", 4.0, "has 2 frames/s, not 4; leave --fps out"),
        (data, "test:0", "0", None, "camera 0: a clip of .* is a part of a video"),
    ):
        with pytest.raises(InputError, match=message):
            find_task(path, name, where, fps, 2.0)


# ---- from the command line -----------------------------------------------------------------------------


def test_a_video_runs_start_to_end_with_the_user_s_lines_and_a_page(run, tmp_path, capsys, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 120)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n@1.2 and now?\n"))
    frames = streamed(capsys, run, path, *THRESHOLDS, "--stdin", "--html", tmp_path / "v.html")
    assert [(f["frame"], f["time_s"]) for f in frames] == [(i, i / 2) for i in range(8)]
    assert [f["user_texts"] for f in frames][:5] == [["hello"], [], [], ["and now?"], []]
    assert all(0 < f["probabilities"]["speaking"] < 1 for f in frames)
    assert (tmp_path / "v.html").stat().st_size > 1000
    monkeypatch.setattr("sys.stdin", io.StringIO("of a shell's loop\n"))
    assert not any(f["user_texts"] for f in streamed(capsys, run, path, *THRESHOLDS))
    assert sys.stdin.read() == "of a shell's loop\n"


def test_the_page_replaces_no_file_that_is_no_page(run, tmp_path, capsys):
    path, task = write_video(tmp_path / "v.mp4", 2), task_file(tmp_path, {"goal": "Tea"})
    before = path.read_bytes()
    for html in (path, task, "/dev/null"):
        assert main(["stream", str(run), str(path), *THRESHOLDS, "--task", str(task), "--html", str(html)]) == 2
        assert "its name is no page's; expected a new name, or one in .html" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_video_that_lost_its_end_says_so_after_what_is_there(run, tmp_path, capsys):
    path = write_video(tmp_path / "v.mkv", 240)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert main(["stream", str(run), str(path), *THRESHOLDS, "--json"]) == 1
    out, err = capsys.readouterr()
    assert 4 <= len(out.splitlines()) < 14
    assert re.search(r"v.mkv: ends after [\d.]+ of 8 seconds; get the whole file", err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stream_that_is_stopped_keeps_its_page(run, data, tmp_path, monkeypatch, number, status):
    step = Stream.step

    def stopped(self, video_frame, texts=()):
        if video_frame.frame == 3:
            signal.raise_signal(number)
        return step(self, video_frame, texts)

    monkeypatch.setattr(Stream, "step", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    path = data / "frames-on-disk" / "test-v0.arrow"
    try:
        assert main(["stream", str(run), str(path), "--html", str(tmp_path / "kept.html"), *THRESHOLDS]) == status
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) == before[1]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.html"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_video_runs_with_the_real_clip_as_its_task(run, capsys):
    task = SHARED / "prospect_clip.json"
    frames = streamed(capsys, run, SHARED / "drive.mp4", "--task", task, *THRESHOLDS, "--max-tokens", 600)
    assert len(frames) == 33
    assert set(frames[-1]["state"]) == {"S1", "S2", "S3", "S4", "S5", "S6"}
