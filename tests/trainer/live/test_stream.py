"""`stream`: the numbers of free-running evaluation, bounded memory, val's thresholds, tasks, the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example
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
from trainer.live.stream import Stream, decoding_config, find_task
from trainer.live.video_input import VideoFrame

SHARED = Path(__file__).parents[4] / "shared" / "real"
THRESHOLDS = ["--threshold", "speaking=-1,dst_update=-1"]


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


def test_a_streamed_clip_has_the_logits_and_texts_of_the_free_running_evaluation(splits_run, splits, capsys):
    loaded = load_run(splits_run)
    source = PixelFrames(splits / "frames-on-disk", 64)
    decoding = DecodingConfig({"speaking": -1.0, "dst_update": -1.0})
    [one] = free_running(loaded.model, loaded.tokens, [clip(1, "test")], source, loaded.config, decoding)
    assert any(text is not None for text in one.said)
    path = splits / "frames-on-disk" / "test-v1.arrow"
    frames = streamed(capsys, splits_run, path, "--task", splits, "--clip", "test:1", *THRESHOLDS)
    assert [f["frame"] for f in frames] == list(range(one.clip.num_frames))
    for head, logits in one.logits.items():
        assert np.abs(np.array([f["logits"][head] for f in frames]) - logits).max() < 1e-4
    assert [f["assistant_text"] for f in frames] == one.said
    assert [None if f["updates"] is None else tuple(map(tuple, f["updates"])) for f in frames] == one.updates
    assert [f["user_texts"] for f in frames][:3] == [[], ["What now, <image>?"], []]


def test_texts_are_cut_to_the_context_and_probabilities_corrected(splits_run):
    loaded = load_run(splits_run)
    loaded = replace(loaded, info=loaded.info | {"neg_rate": 0.5})
    with Stream(loaded, clip_example([]), NEVER) as stream:
        output = stream.step(frame(0), ["What now? " * 200, "and then?"])
        assert output.tokens <= loaded.config.max_tokens
        assert re.fullmatch("What now[?] What now[?] .*…", *output.user_texts)
        assert stream.probability(0.0) == pytest.approx(1 / 3)  # odds 1 among half of the silence: 1 to 2 in truth


def test_scores_that_are_not_finite_are_an_error(splits_run):
    loaded = load_run(splits_run)
    torch.nn.init.constant_(loaded.model.heads.speak.bias, float("nan"))
    with Stream(loaded, clip_example([]), NEVER) as stream, pytest.raises(NotFiniteError, match="frame 0: the scores"):
        stream.step(frame(0))


def test_memory_is_bounded_and_the_state_outlives_the_context(splits_run, monkeypatch):
    loaded = load_run(splits_run)
    loaded.model.vlm.config.text_config.max_position_embeddings = 150
    texts = iter(["S1->start", "S1->complete, S2->start", *["S9->start"] * 99])
    write = Session._write
    monkeypatch.setattr(Session, "_write", lambda self, role, text: write(self, role, next(texts)))
    decoding = DecodingConfig({"speaking": np.inf, "dst_update": -np.inf}, refractory_s=20, max_text=8)
    pixels = frame(0).pixels
    with Stream(loaded, clip_example([], 0, 1, goal="A toy"), decoding) as stream:
        frames = [stream.step(frame(number, pixels)) for number in range(200)]
        assert {slab.shape[2] for layer in stream._engine._cache._slabs for slab in layer} == {150}
    assert max(f.tokens for f in frames) <= 150
    assert sum(f.started_over for f in frames) > 2
    assert frames[0].state == {"S1": "in_progress", "S2": "not_started"}
    assert frames[40].state == frames[199].state == {"S1": "completed", "S2": "in_progress"}
    assert frames[40].updates == (("S1", "complete"), ("S2", "start"))


def test_thresholds_are_the_evaluation_s_or_the_user_s_and_never_another_checkpoint_s(splits_run, splits, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(splits_run / "last", run / "last")
    with pytest.raises(
        InputError, match=r"no evaluation of this checkpoint .* run prospect-dst evaluate .* or give --threshold"
    ):
        decoding_config(run, {}, None)
    evaluate(run, splits, live=False)
    path = run / "evaluation-test" / "metrics.json"
    metrics = json.loads(path.read_text())
    chosen = metrics["thresholds"]["event"]
    for place in (run, run / "last"):
        assert decoding_config(place, {}, None) == DecodingConfig({"dst_update": np.inf, **chosen}, 2.0)
    mixed = DecodingConfig({"speaking": chosen["speaking"], "dst_update": 3.0}, 0.5)
    assert decoding_config(run, {"dst_update": 3.0}, 0.5) == mixed
    path.write_text(json.dumps(metrics | {"model": "0" * 64}))
    with pytest.raises(InputError, match=r"no evaluation of this checkpoint"):
        decoding_config(run, {}, None)
    own = DecodingConfig({"speaking": 3.0, "dst_update": np.inf}, 2.0)
    assert decoding_config(run, {"speaking": 3.0}, None) == own


# ---- tasks ---------------------------------------------------------------------------------------------


def task_file(tmp_path: Path, content) -> Path:
    (tmp_path / "task.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "task.json"


STEPS = (("S1", "Boil water"), ("S2", "Pour"))


def read_task(path: Path, clip: str | None = None):
    task, heard = find_task(path, clip, "at/v.mp4", None, 2.0)
    assert (task.clip_id, task.fps, task.num_frames, heard) == ("v.mp4", 2.0, 0, {})
    return task


def test_a_task_is_given_by_names_by_ids_or_by_a_clip(tmp_path):
    by_names = read_task(task_file(tmp_path, {"goal": "Tea", "steps": ["Boil water", "Pour"]}))
    assert (by_names.goal, by_names.steps, by_names.initial_state) == ("Tea", STEPS, ())
    one = {"id": "a", "inferred_goal": "Tea", "inferred_knowledge": ["Boil", "Pour"],
           "dst": [{"id": i, "name": name, "start_ts": 0} for i, name in STEPS],
           "initial_dst_state": {"S1": "completed"}, "conversation": [{"role": "user", "content": "Hi"}]}  # fmt: skip
    lines = "".join(json.dumps(one | {"id": i}, ensure_ascii=False) + "\r\n" for i in ("b\u2028", "a"))
    for content, name in (([one], None), ([one | {"id": "b"}, one], "1"), (lines, "a")):
        task = read_task(task_file(tmp_path, content), name)
        assert (task.goal, task.knowledge, task.steps) == ("Tea", "Boil\nPour", STEPS)
        assert (task.initial_state, task.turns) == ((("S1", "completed"),), ())
    updates = [{"role": "DST_UPDATE", "content": [{"id": "S1", "transition": "start"}]}]
    late = task_file(tmp_path, one | {"conversation": updates})  # generators write the state at the clip's end
    assert read_task(late).initial_state == ()


def test_a_task_of_another_form_is_an_error(tmp_path):
    for content, message in (
        ("{", "task.json: not JSON"),
        ([{"id": "a"}, {"id": "b"}], "task.json: 2 clips fit, expected one; name it with --clip, e.g. a, b"),
        ({"steps": ["a"], "initial_state": {"S2": "completed"}}, "expected steps of .*, and initial_state by them: S1"),
        ({"steps": [1]}, "task.json: .*; expected something like"),
    ):
        with pytest.raises(InputError, match=message):
            read_task(task_file(tmp_path, content))


# ---- from the command line -----------------------------------------------------------------------------


def test_a_video_runs_start_to_end_with_the_user_s_lines_and_a_page(splits_run, tmp_path, capsys, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 120)
    (tmp_path / "script").write_text("hello\n@1.2 and now?\n")
    monkeypatch.setattr("sys.stdin", (tmp_path / "script").open())
    frames = streamed(capsys, splits_run, path, *THRESHOLDS, "--stdin", "--html", tmp_path / "v.html")
    assert [(f["frame"], f["time_s"]) for f in frames] == [(i, i / 2) for i in range(8)]
    assert [f["user_texts"] for f in frames][:5] == [["hello"], [], [], ["and now?"], []]
    assert all(0 < f["probabilities"]["speaking"] < 1 for f in frames)
    assert (tmp_path / "v.html").stat().st_size > 1000


def test_without_stdin_a_shell_s_loop_keeps_its_lines_and_ctrl_c_keeps_the_page(
    splits_run, splits, tmp_path, monkeypatch
):
    step = Stream.step

    def stopped(self, video_frame, texts=()):
        if video_frame.frame == 3:
            raise KeyboardInterrupt
        assert not texts
        return step(self, video_frame, texts)

    monkeypatch.setattr(Stream, "step", stopped)
    monkeypatch.setattr("sys.stdin", io.StringIO("of a shell's loop\n"))
    path = splits / "frames-on-disk" / "test-v0.arrow"
    assert main(["stream", str(splits_run), str(path), "--html", str(tmp_path / "kept.html"), *THRESHOLDS]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept.html"]
    assert sys.stdin.read() == "of a shell's loop\n"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_video_runs_with_the_real_clip_as_its_task(splits_run, capsys):
    task = SHARED / "prospect_clip.json"
    frames = streamed(capsys, splits_run, SHARED / "drive.mp4", "--task", task, *THRESHOLDS, "--max-tokens", 600)
    assert len(frames) == 33
    assert set(frames[-1]["state"]) == {"S1", "S2", "S3", "S4", "S5", "S6"}
