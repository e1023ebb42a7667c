"""Synthetic data: the files of a real data set, labels that follow from the pictures, the same bytes every time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import synth as module
from pipeline.media import find_frames, open_pictures
from pipeline.synth import SynthConfig, parse_tells, plan_recording, synth

SMALL = SynthConfig(recordings={"train": 2, "val": 1}, difficulty=0, seed=5)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "out"
    assert set(synth(folder, SMALL)) == set(SMALL.recordings)
    return folder


@pytest.fixture(scope="module")
def clips(out) -> list[dict[str, Any]]:
    return [clip for split in SMALL.recordings for clip in json.loads((out / f"{split}_training.json").read_text())]


def turns(clip: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [turn for turn in clip["conversation"] if turn["role"] == role]


def read_frames(root: Path, clip: dict[str, Any]) -> np.ndarray:
    opened = open_pictures(find_frames(root, clip["video_uid"], clip["frames_file"]))
    return np.stack([np.asarray(opened.image(i, 2.0)) for i in range(opened.count())])


def test_jigs_and_lamps_are_seen_one_frame_before_what_follows_from_them_and_nowhere_else(out, clips):
    checked = 0
    for clip in clips:
        start, end = clip["start_frame_idx"], clip["end_frame_idx"]
        frames = read_frames(out, clip)
        jig = (frames > 225).all(axis=3).mean(axis=(1, 2)) > 0.1
        expected = np.zeros(len(jig), bool)
        for turn in turns(clip, "DST_UPDATE"):
            expected[turn["start_frame"] - 1 :][:3] = True
            checked += 1
        assert jig[start:end].tolist() == expected[start:end].tolist()
        red, green, blue = np.moveaxis(frames[start:end].astype(int), 3, 0)
        lamp = ((red > 180) & (green < 110) & (blue > 160)).mean(axis=(1, 2)) > 0.05
        lit = [f for f in range(1, len(lamp)) if lamp[f] and not lamp[f - 1]]
        asked = [turn["start_frame"] - start for turn in turns(clip, "user")]
        spoken = [turn["start_frame"] - start for turn in turns(clip, "assistant")]
        assert spoken == sorted(frame + 1 for frame in asked + lit)
    assert checked > 30


def test_dst_state_is_the_state_before_the_turn_and_goes_from_clip_to_clip(clips):
    after = {"start": "in_progress", "complete": "completed"}
    left: dict[str, dict[str, str]] = {}
    for clip in clips:
        state = dict(clip["initial_dst_state"])
        assert state == left.get(clip["video_uid"], state)
        assert list(state.values()) == ["completed"] * (len(state) - 1) + ["in_progress"]
        for turn in clip["conversation"][1:]:
            assert clip["start_frame_idx"] <= turn["start_frame"] <= turn["time"] * 2 < turn["end_frame"]
            assert turn["end_frame"] < clip["end_frame_idx"]
            update = turn["content"][0] if turn["role"] == "DST_UPDATE" else None
            unseen = {update["id"]: "not_started"} if update and update["id"] not in state else {}
            assert turn["dst_state"] == {**state, **unseen}
            if update:
                state[update["id"]] = after[update["transition"]]
        left[clip["video_uid"]] = state


def plans(state_tells: float) -> list[module.Recording]:
    config = SynthConfig(tells={"state": state_tells, "vision": 1 - state_tells})
    return [plan_recording(f"nusar-{i}", np.random.default_rng([1, i]), config) for i in range(100)]


@pytest.mark.parametrize("state_tells", [0, 0.3, 1])
def test_each_completed_step_is_announced_by_its_name_or_by_the_lamp_never_by_both(state_tells):
    named, speaks = [], []
    for plan in plans(state_tells):
        for event in (event for event in plan.events if event.kind == "placement"):
            name = plan.step_names[event.step]
            named.append(name.endswith((" aloud", " quietly")))
            speaks.append(event.speaks)
            assert event.lamp == (event.speaks and not named[-1])
            assert name.endswith(" aloud") == (event.speaks and named[-1])
    assert abs(np.mean(named) - state_tells) < 0.05
    assert 0.4 < np.mean(speaks) < 0.6


def conversations(tells: dict[str, float], count: int = 60) -> list[tuple[dict[str, Any], dict[str, list[int]]]]:
    """(clip, by role the frames at which its turns start) of many recordings."""
    clips = []
    for i in range(count):
        plan = plan_recording(f"nusar-{i}", np.random.default_rng([2, i]), SynthConfig(tells=tells))
        clips += module.make_clips(plan, 0, np.random.default_rng([3, i]))
        assert not any(event.lamp for event in plan.events)
    return [(c, {r: [t["start_frame"] for t in turns(c, r)] for r in ("user", "assistant")}) for c in clips]


def test_in_the_world_user_what_the_user_says_tells_and_that_he_speaks_does_not():
    answered = []
    for clip, frames in conversations({"user": 1.0}):
        questions = [t for t in turns(clip, "user") if t["content"].endswith(("right?", "on?", "fit?"))]
        asked = [turn["start_frame"] for turn in questions]
        assert frames["assistant"] == [frame + 1 for frame in asked]
        answered += [frame in asked for frame in frames["user"]]
    assert 0.4 < np.mean(answered) < 0.6
    assert len(answered) > 500


def test_in_the_world_history_each_question_is_answered_and_followed_up_after_6_and_14_frames():
    for _, frames in conversations({"history": 1.0}):
        assert frames["assistant"] == [asked + after for asked in frames["user"] for after in (1, 7, 15)]
        assert frames["user"]


def test_in_the_world_nothing_speech_comes_at_one_rate_whatever_happened_before():
    hazard = {True: [], False: []}  # soon after a placement, or not
    for clip, frames in conversations({"nothing": 1.0}, 200):
        assert not frames["user"]
        updates = {turn["start_frame"] for turn in turns(clip, "DST_UPDATE")}
        last = -9
        for frame in range(clip["start_frame_idx"] + 3, clip["end_frame_idx"] - 2):
            last = frame - 1 if frame - 1 in frames["assistant"] else last
            if last != frame - 1:  # its turn is two frames long
                hazard[bool(updates & {frame - 2, frame - 1, frame})].append(frame in frames["assistant"])
    assert abs(np.mean(hazard[True]) - np.mean(hazard[False])) < 0.01
    assert 0.09 < np.mean(hazard[False]) < 0.11


def test_worlds_mix_by_the_share_of_steps():
    assert parse_tells("state=0.7, vision=0.3") == {"state": 0.7, "vision": 0.3}
    assert parse_tells("user") == {"user": 1.0}
    config = SynthConfig(tells={"state": 0.5, "history": 0.25, "nothing": 0.25}, steps=(12, 12))
    many = [plan_recording("n", np.random.default_rng([4, i]), config) for i in range(200)]
    named = np.mean([name.endswith((" aloud", " quietly")) for plan in many for name in plan.step_names])
    followed = np.mean([sum(bool(event.follow_ups) for event in plan.events) / 12 for plan in many])
    assert abs(named - 0.5) < 0.03
    assert abs(followed - 0.25) < 0.03


def test_the_same_seed_gives_the_same_bytes_and_more_training_recordings_leave_val_alone(tmp_path):
    def val(name: str, seed: int, train: int) -> dict[str, bytes]:
        synth(tmp_path / name, SynthConfig(recordings={"train": train, "val": 1}, views=1, steps=(3, 4), seed=seed))
        return {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*val*")}

    assert val("a", 0, 1) == val("b", 0, 2) != val("c", 1, 1)
