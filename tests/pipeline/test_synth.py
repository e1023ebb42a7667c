"""Made-up videos: the files are a user's, labels follow the picture, the state tells what it should."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import synth as module
from pipeline.media import find_frames
from pipeline.synth import SynthConfig, SynthReport, plan_recording, synth

SMALL = SynthConfig(recordings={"train": 3, "val": 1, "test": 1}, difficulty=0, seed=5)

# Typed off a real clip. `id` and `initial_dst_state` are the two fields it lacks and others have.
REAL_CLIP_KEYS = {
    *("video_uid", "inferred_goal", "inferred_knowledge", "video_labels", "conversation", "dst"),
    *("frames_file", "start_frame_idx", "end_frame_idx", "seq_len", "dataset", "clip_idx"),
    *("max_seq_len", "num_tokens_per_img", "fps", "quality"),
}
REAL_TURN_KEYS = {"role", "content", "time", "start_frame", "end_frame", "dst_state", "labels"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SynthReport]:
    out = tmp_path_factory.mktemp("synth") / "out"
    return out, synth(out, SMALL)


@pytest.fixture(scope="module")
def clips(made: tuple[Path, SynthReport]) -> dict[str, list[dict[str, Any]]]:
    return {split: json.loads((made[0] / f"{split}_training.json").read_text()) for split in SMALL.recordings}


def every(clips: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [clip for split in clips.values() for clip in split]


def turns(clip: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [turn for turn in clip["conversation"] if turn["role"] == role]


def read_frames(root: Path, clip: dict[str, Any]) -> np.ndarray:
    path = find_frames(root, clip["video_uid"], clip["frames_file"])
    assert path is not None
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_stream(source).read_all()["frame"]
        return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(x.as_py())))) for x in column])


def has_jig(frames: np.ndarray) -> list[bool]:
    return ((frames > 225).all(axis=3).mean(axis=(1, 2)) > 0.1).tolist()


def has_lamp(frames: np.ndarray) -> list[bool]:
    red, green, blue = np.moveaxis(frames.astype(int), 3, 0)
    return (((red > 180) & (green < 110) & (blue > 160)).mean(axis=(1, 2)) > 0.05).tolist()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- files ---------------------------------------------------------------------------------------------


def test_clips_have_the_fields_of_a_real_one(clips):
    for clip in every(clips):
        assert set(clip) == REAL_CLIP_KEYS | {"id", "initial_dst_state"}
        assert clip["fps"] == 2
        assert isinstance(clip["fps"], int)
        assert clip["dataset"] == "synth"
        assert all(type(clip[key]) is int for key in ("start_frame_idx", "end_frame_idx", "clip_idx"))
        assert {tuple(step) for step in clip["dst"]} == {("type", "id", "start_ts", "end_ts", "name")}
        assert [step["id"] for step in clip["dst"]] == [f"S{i + 1}" for i in range(len(clip["dst"]))]
        assert clip["inferred_knowledge"].splitlines()[:2] == [
            clip["inferred_goal"],
            f"1. {clip['dst'][0]['name']}",
        ]
    assert len({clip["id"] for clip in every(clips)}) == len(every(clips))


def test_turns_have_the_fields_of_real_ones(clips):
    for clip in every(clips):
        system, *others = clip["conversation"]
        assert system | {"content": ""} == {
            "role": "system",
            "content": "",
            "start_frame": 0,
            "end_frame": 1,
            "labels": "system|generic",
        }
        assert {frozenset(turn) for turn in others} == {frozenset(REAL_TURN_KEYS)}
        for turn in turns(clip, "DST_UPDATE"):
            assert [set(update) for update in turn["content"]] == [{"id", "transition"}]
            assert turn["content"][0]["transition"] in ("start", "complete")
        assert all(type(turn["content"]) is str for turn in turns(clip, "user") + turns(clip, "assistant"))


def test_turns_follow_the_event_convention_on_absolute_frames(clips):
    for clip in every(clips):
        for turn in clip["conversation"][1:]:
            assert turn["end_frame"] == turn["start_frame"] + 2
            # the time lies in the second of the two frames, as in the real clip
            assert int(turn["time"] * 2) == turn["end_frame"] - 1
        starts = [turn["time"] for turn in clip["conversation"][1:]]
        assert starts == sorted(starts)


def test_a_completed_step_a_started_one_and_the_praise_share_their_time(clips):
    seen = [
        [turn["role"] for turn in clip["conversation"][1:] if turn["time"] == update["time"]]
        for clip in every(clips)
        for update in turns(clip, "DST_UPDATE")
        if update["content"][0]["transition"] == "complete"
    ]
    assert ["DST_UPDATE", "DST_UPDATE", "assistant"] in seen
    assert ["DST_UPDATE", "DST_UPDATE"] in seen
    assert all(roles[0] == "DST_UPDATE" and len(roles) <= 3 for roles in seen)


def test_frames_are_an_arrow_stream_of_base64_jpeg_that_covers_the_clips(made, clips):
    for clip in every(clips):
        path = made[0] / clip["frames_file"]
        assert path.stem != clip["video_uid"]
        assert clip["video_uid"] == f"synth_{path.stem}"
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            assert reader.schema == pa.schema([("frame", pa.string())])
            sizes = [batch.num_rows for batch in reader]
        assert max(sizes) <= 100
        assert sum(sizes) >= clip["end_frame_idx"]
    frames = read_frames(made[0], clips["val"][0])
    assert frames.shape[1:] == (64, 64, 3)
    assert frames.dtype == np.uint8


def test_the_report_counts_what_is_on_disk(made, clips):
    out, report = made
    assert list(report.splits) == ["train", "val", "test"]
    for split, counts in report.splits.items():
        assert (counts.recordings, counts.videos) == (SMALL.recordings[split], 2 * SMALL.recordings[split])
        assert counts.clips == len(clips[split])
        files = {clip["frames_file"] for clip in clips[split]}
        rows = sum(len(read_frames(out, {"video_uid": "x", "frames_file": file})) for file in files)
        assert counts.frames == rows
        sizes = [(out / file).stat().st_size for file in files]
        assert counts.bytes == sum(sizes) + (out / f"{split}_training.json").stat().st_size
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]  # nothing left beside it


# ---- labels and picture --------------------------------------------------------------------------------


def test_a_step_is_complete_one_frame_after_its_jig_appears_and_nowhere_else(made, clips):
    checked = 0
    for clip in every(clips):
        start, end = clip["start_frame_idx"], clip["end_frame_idx"]
        jig = has_jig(read_frames(made[0], clip))
        expected = [False] * len(jig)
        for turn in turns(clip, "DST_UPDATE"):
            appears = turn["start_frame"] - 1
            expected[appears : appears + 3] = [True] * 3
            checked += 1
        assert jig[start:end] == expected[start:end]
    assert checked > 50


def test_without_the_state_every_word_follows_a_lamp_or_a_question_one_frame_later(made, clips):
    for clip in every(clips):
        start, end = clip["start_frame_idx"], clip["end_frame_idx"]
        lamp = has_lamp(read_frames(made[0], clip))[start:end]
        asked = [turn["start_frame"] - start for turn in turns(clip, "user")]
        lit = [f for f in range(1, len(lamp)) if lamp[f] and not lamp[f - 1]]
        spoken = [turn["start_frame"] - start for turn in turns(clip, "assistant")]
        assert spoken == sorted(frame + 1 for frame in asked + lit)


def test_clips_start_and_end_in_silence_in_mid_task_and_do_not_overlap(clips):
    ends: dict[str, int] = {}
    for clip in every(clips):
        first, last = clip["conversation"][1], clip["conversation"][-1]
        assert first["start_frame"] >= clip["start_frame_idx"] + 2
        assert last["end_frame"] <= clip["end_frame_idx"] - 2
        assert clip["start_frame_idx"] >= max(1, ends.get(clip["video_uid"], 0))
        ends[clip["video_uid"]] = clip["end_frame_idx"]
    assert len({tuple(clip["initial_dst_state"].values()) for clip in every(clips)}) > 3


def test_dst_state_is_the_state_before_the_turn(clips):
    after = {"start": "in_progress", "complete": "completed"}
    for clip in every(clips):
        state = dict(clip["initial_dst_state"])
        assert list(state.values()) == ["completed"] * (len(state) - 1) + ["in_progress"]
        for turn in clip["conversation"][1:]:
            update = turn["content"][0] if turn["role"] == "DST_UPDATE" else None
            unseen = {update["id"]: "not_started"} if update and update["id"] not in state else {}
            assert turn["dst_state"] == {**state, **unseen}
            if update:
                state[update["id"]] = after[update["transition"]]


def test_one_video_hands_its_state_from_clip_to_clip(clips):
    for previous, clip in zip(clips["train"], clips["train"][1:], strict=False):
        if previous["video_uid"] == clip["video_uid"]:
            state = dict(previous["initial_dst_state"])
            for turn in turns(previous, "DST_UPDATE"):
                (update,) = turn["content"]
                state[update["id"]] = "completed" if update["transition"] == "complete" else "in_progress"
            assert clip["initial_dst_state"] == state


# ---- recordings, views, splits -------------------------------------------------------------------------


def recording_of(clip: dict[str, Any]) -> str:
    found = re.search(r"nusar-.*?(?=__)", clip["video_uid"])
    assert found
    return found[0]


def test_splits_share_no_recording(clips):
    names = {split: {recording_of(clip) for clip in clips[split]} for split in clips}
    assert {split: len(found) for split, found in names.items()} == {"train": 3, "val": 1, "test": 1}
    assert len(set.union(*names.values())) == 5


def test_views_of_a_recording_share_events_and_differ_in_pictures(made, clips):
    def without_names(clip: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in clip.items() if key not in ("id", "video_uid", "frames_file")}

    for recording in {recording_of(clip) for clip in every(clips)}:
        of_view = [
            [clip for clip in every(clips) if clip["video_uid"] == f"synth_{recording}__view{view}"] for view in (0, 1)
        ]
        assert [without_names(clip) for clip in of_view[0]] == [without_names(clip) for clip in of_view[1]]
        first, second = (read_frames(made[0], view[0]) for view in of_view)
        assert first.shape == second.shape
        assert np.abs(first.astype(int) - second).mean() > 5


# ---- what the state tells ------------------------------------------------------------------------------


def plans(state_tells: float, count: int = 200) -> list[module.Recording]:
    config = SynthConfig(state_tells=state_tells)
    return [plan_recording(f"nusar-{i}", np.random.default_rng([1, i]), config) for i in range(count)]


def placements(plan: module.Recording) -> list[module.Event]:
    return [event for event in plan.events if event.kind == "placement"]


def test_at_0_the_lamp_tells_and_no_step_name_does():
    every_plan = plans(0)
    assert all(re.fullmatch(r"Fit the \w+", name) for plan in every_plan for name in plan.step_names)
    events = [event for plan in every_plan for event in placements(plan)]
    assert all(event.lamp == event.speaks for event in events)
    assert 0.45 < np.mean([event.speaks for event in events]) < 0.55
    for step in range(8):  # nor does the step's number
        assert 0.35 < np.mean([placements(plan)[step].speaks for plan in every_plan]) < 0.65


def test_at_1_the_step_name_tells_and_no_lamp_does():
    for plan in plans(1):
        for event in placements(plan):
            assert not event.lamp
            assert plan.step_names[event.step].endswith(" aloud" if event.speaks else " quietly")


def test_at_1_each_toy_has_one_plan_with_as_many_loud_steps_as_quiet_ones():
    plans_of: dict[str, set[str]] = {}
    for plan in plans(1):
        letters = "".join("a" if name.endswith("aloud") else "q" for name in plan.step_names)
        plans_of.setdefault(plan.goal, set()).add(letters)
    assert len(plans_of) == 3
    for found in plans_of.values():
        longest = max(found, key=len)
        assert longest.count("a") == longest.count("q") == 6
        assert all(longest.startswith(letters) for letters in found)


def test_between_either_the_name_or_the_lamp_tells_never_both():
    told = []
    for plan in plans(0.3):
        for event in placements(plan):
            name = plan.step_names[event.step]
            told.append(name.endswith((" aloud", " quietly")))
            assert event.lamp == (event.speaks and not told[-1])
            assert name.endswith(" aloud") == (event.speaks and told[-1])
    assert 0.25 < np.mean(told) < 0.35


@pytest.mark.parametrize(("state_tells", "low", "high"), [(0, 0.4, 0.6), (1, 0.65, 0.8)])
def test_speaking_and_updates_never_coincide_everywhere(state_tells, low, high):
    events = [event for plan in plans(state_tells) for event in plan.events]
    spoken = [event for event in events if event.speaks]
    assert low < np.mean([event.kind == "placement" for event in spoken]) < high
    assert {event.kind for event in spoken} == {"placement", "lamp", "question"}
    assert 0.4 < np.mean([event.speaks for event in events if event.kind == "placement"]) < 0.6


def test_where_a_clip_s_first_event_lies_and_how_far_its_task_is_differ_from_clip_to_clip():
    first = [
        next(event for event in plan.events if event.frame >= start) for plan in plans(1) for start, _ in plan.clips
    ]
    starts = [start for plan in plans(1) for start, _ in plan.clips]
    leads = [event.frame - start for event, start in zip(first, starts, strict=True)]
    assert {lead: leads.count(lead) > 50 for lead in leads} == dict.fromkeys((2, 3, 4, 5, 6), True)
    steps = [event.step for event in first if event.kind == "placement"]
    assert all(steps.count(step) > 10 for step in range(8))


def test_every_clip_has_its_number_of_events_and_every_event_lies_whole_inside_or_outside():
    for plan in plans(0.5):
        assert all(end <= start for (_, end), (start, _) in zip(plan.clips, plan.clips[1:], strict=False))
        assert plan.clips[-1][1] < plan.num_frames
        for start, end in plan.clips:
            assert 4 <= sum(start <= event.frame < end for event in plan.events) <= 8
            for event in plan.events:
                assert event.frame + 3 <= start or start + 2 <= event.frame <= end - 6 or end <= event.frame


# ---- the same bytes, and refusals ----------------------------------------------------------------------


def test_another_process_writes_the_same_bytes_and_never_imports_torch(tmp_path):
    config = SynthConfig(recordings={"train": 1, "val": 1}, steps=(3, 4), difficulty=0.8, state_tells=0.5)
    synth(tmp_path / "here", config)
    code = (
        "import sys; from pathlib import Path; from pipeline.synth import SynthConfig, synth;"
        "synth(Path(sys.argv[1]), SynthConfig(recordings={'train': 1, 'val': 1}, steps=(3, 4),"
        " difficulty=0.8, state_tells=0.5)); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "there"], check=True, env=environment)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert len(digests(tmp_path / "here")) == 2 + 4


def test_the_seed_matters_and_more_training_recordings_leave_val_alone(tmp_path):
    def val(name: str, seed: int, train: int) -> dict[str, str]:
        synth(tmp_path / name, SynthConfig(recordings={"train": train, "val": 1}, steps=(3, 4), seed=seed))
        return {file: sha for file, sha in digests(tmp_path / name).items() if "val" in file}

    assert val("a", 0, 1) == val("b", 0, 2)
    assert val("c", 1, 1) != val("a2", 0, 1)


def test_an_empty_folder_is_filled_and_one_that_is_not_is_refused_and_left_alone(tmp_path):
    tiny = SynthConfig(recordings={"val": 1}, views=1, steps=(3, 3), px=32)
    synth(tmp_path, tiny)
    before = digests(tmp_path)
    assert set(before) == {"val_training.json", "frames/nusar-val-0000__view0.arrow"}
    with pytest.raises(ValueError, match=r"not empty; expected a new or empty folder") as error:
        synth(tmp_path, tiny)
    assert "\n" not in str(error.value)
    assert digests(tmp_path) == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_frames", full)
    with pytest.raises(OSError, match="disk full"):
        synth(tmp_path / "out", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"recordings": {"train": 0}}, "recordings: found {'train': 0}; expected 1 or more"),
        ({"recordings": {"dev": 3}}, "recordings: found {'dev': 3}"),
        ({"recordings": {}}, "recordings"),
        ({"views": 0}, "views: found 0; expected 1 or more"),
        ({"steps": (9, 4)}, r"steps: found \(9, 4\); expected 3 <= fewest <= most <= 16"),
        ({"steps": (3, 17)}, "steps"),
        ({"events_per_clip": (1, 4)}, "events_per_clip"),
        ({"px": 16}, "px: found 16"),
        ({"fps": 0}, "fps: found 0"),
        ({"difficulty": 1.2}, "difficulty: found 1.2; expected a number from 0 to 1"),
        ({"state_tells": float("nan")}, "state_tells: found nan"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_a_setting_out_of_range_is_said_in_one_line(wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        SynthConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{"px": 96}, {"fps": 3.7}, {"difficulty": 1.0}, {"state_tells": 1.0}])
def test_other_settings_keep_turns_inside_their_clips(tmp_path, config):
    chosen = SynthConfig(recordings={"test": 2}, views=1, steps=(5, 6), **config)
    synth(tmp_path / "out", chosen)
    for clip in json.loads((tmp_path / "out" / "test_training.json").read_text()):
        for turn in clip["conversation"][1:]:
            assert clip["start_frame_idx"] <= turn["start_frame"] <= turn["time"] * chosen.fps < turn["end_frame"]
            assert turn["end_frame"] < clip["end_frame_idx"]
        assert read_frames(tmp_path / "out", clip).shape[1:] == (chosen.px, chosen.px, 3)
