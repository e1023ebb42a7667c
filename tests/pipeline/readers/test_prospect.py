"""Training files as the public generators write them: fields, bounds, states, conventions, and what is no use."""

from __future__ import annotations

import pytest
from made_up import SYSTEM, TEA, run, run_on, tea, turn, written

from pipeline.errors import InputError

SPEAKING, UPDATES = [3, 9, 18, 27, 41], [9, 27, 35]


# ---- fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "knowledge"),
    [([], None), ("", None), ([""], None), ("boil, pour", "boil, pour"), (["1. boil", "2. pour"], "1. boil\n2. pour")],
)
def test_knowledge_may_be_a_list(given, knowledge, tmp_path):
    out = run(tmp_path, [tea(TEA, 0, 42, metadata={"user_id": "no_talk_0", "knowledge": given})])
    assert out.clips()[0]["knowledge"] == knowledge
    assert out.ones() == (SPEAKING, UPDATES)
    assert out.manifest["inputs"][0]["ignored_fields"] == {}


def test_descriptive_fields_of_any_other_type_are_ignored_and_counted(tmp_path):
    steps = [{"id": "K1", "name": 5}, {"id": "K2", "name": ["pour", "it"]}]
    odd = {"inferred_knowledge": 7, "inferred_goal": {"a": 1}, "dataset": 5, "dst": steps}
    clips = [
        tea(TEA, 0, 42, **odd),
        tea(TEA, 0, 42, id="t2", metadata="no_talk", inferred_goal=["make", "tea"]),
        tea(TEA, 0, 42, id="t3", inferred_knowledge=[1], unheard_of={"x": [None]}, metadata={"task_goal": "tea"}),
    ]
    out = run(tmp_path, clips)
    assert out.manifest["inputs"][0]["ignored_fields"] == {
        "dataset": 1,
        "dst.name": 1,
        "inferred_goal": 1,
        "inferred_knowledge": 2,
        "metadata": 1,
    }
    assert [row["goal"] for row in out.clips()] == [None, "make\ntea", "tea"]
    row = out.clips()[0]
    assert (row["knowledge"], row["dataset"]) == (None, "unknown")
    assert row["steps"] == [{"id": "K1", "name": ""}, {"id": "K2", "name": "pour\nit"}]


def test_steps_may_be_nested_and_numbered_and_frames_written_as_floats(tmp_path):
    nested = {"steps": [{"id": 1, "name": "boil", "t0": 5.0, "conf": 0.9}], "model": "x"}
    floats = [said | {name: float(said[name]) for name in ("start_frame", "end_frame")} for said in TEA]
    out = run(tmp_path, [tea(floats, 0.0, 42.0, dst=nested)])
    assert out.clips()[0]["steps"] == [{"id": "1", "name": "boil"}]
    assert out.ones() == (SPEAKING, UPDATES)


@pytest.mark.parametrize(
    ("change", "turn", "field", "found"),
    [
        ({"time": "soon"}, 1, "time", '"soon"'),
        ({"time": float("nan")}, 1, "time", "NaN"),
        ({"start_frame": -1}, 1, "start_frame", "-1"),
        ({"start_frame": 9.5}, 1, "start_frame", "9.5"),
        ({"start_frame": 9}, 1, "end_frame", "4"),
        ({"role": "robot"}, 1, "role", '"robot"'),
        ({"content": 5}, 1, "content", "5"),
        ({"role": "DST_UPDATE", "content": "K1->explode"}, 1, "content", '"explode"'),
        ({"role": "DST_UPDATE", "content": [{"id": "K1", "transition": "boil"}]}, 1, "content[0].transition", '"boil"'),
    ],
)
def test_a_turn_that_decides_a_label_is_refused_with_what_was_found(change, turn, field, found, tmp_path):
    out = run(tmp_path, [tea([TEA[0] | change, *TEA[1:]], 0, 42), tea(TEA, 0, 42, id="t2")])
    (line,) = out.refused()
    assert (line["clip"], line["turn"], line["field"]) == (0, turn, field)
    assert line["found"].strip("'") == found


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"video_uid": "../a"}, "video_uid"),
        ({"frames_file": "/a"}, "frames_file"),
        ({"id": ""}, "id"),
        ({"fps": 0}, "fps"),
        ({"fps": "1/0"}, "fps"),
        ({"neg_frame_sampling_rate": 1.5}, "neg_frame_sampling_rate"),
        ({"initial_dst_state": {"K1": "hot"}}, "initial_dst_state.K1"),
        ({"end_frame_idx": 2_000_000}, "end_frame_idx"),
        ({"conversation": {}}, "conversation"),
    ],
)
def test_a_clip_field_that_decides_is_refused(more, field, tmp_path):
    out = run(tmp_path, [tea(TEA, 0, 42) | more, tea(TEA, 0, 42, id="t2")])
    assert [line["field"] for line in out.refused()] == [field]


# ---- bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "bounds"), [("auto", (0, 42)), ("given", (4, 36)), ("turns", (0, 42))])
def test_bounds_of_dst_turns_alone_are_widened_to_all_turns(option, bounds, tmp_path):
    out = run(tmp_path, [tea(TEA, 4, 36)], bounds=option)
    assert out.bounds() == [bounds]
    assert out.manifest["inputs"][0]["bounds_widened"] == (option != "given")


def test_bounds_that_no_turn_leaves_stay(tmp_path):
    updates = [said for said in TEA if said["role"] == "DST_UPDATE"]
    assert run(tmp_path, [tea(updates, 4, 36)], frame_convention="lead-in").bounds() == [(4, 36)]


@pytest.mark.parametrize(("others", "widened"), [(1, True), (2, False)])
def test_nine_in_ten_clips_decide_for_the_file_and_wider_bounds_stay(others, widened, tmp_path):
    clips = [tea(TEA, 4, 36, id=f"t{i}", video_uid=f"kitchen-{i}") for i in range(9)]
    clips += [tea(TEA, 0, 60, id=f"o{i}", video_uid=f"other-{i}") for i in range(others)]
    assert run(tmp_path, clips).bounds() == [(0, 42) if widened else (4, 36)] * 9 + [(0, 60)] * others


def test_a_segment_without_updates_has_no_bounds_of_its_own(tmp_path):
    later = [turn("assistant", "Still hot?", 50.0, 90, 100), turn("assistant", "Drink.", 56.0, 100, 112)]
    out = run(tmp_path, [tea(TEA, 4, 36), tea(later, 0, 0, id="t2", clip_idx=1)])
    assert out.bounds() == [(0, 42), (90, 112)]
    assert out.ones(clip=1) == ([99, 111], [])


def test_bounds_reach_down_to_the_event_of_an_empty_first_range(tmp_path):
    """The turn at 14.3 s fell into the frame of the one before, which stands in the earlier clip: event frame 27."""
    later = [turn("assistant", "Pour.", 14.3, 28, 28), *TEA[8:]]
    out = run(tmp_path, [tea(later, 28, 36)], frame_convention="lead-in")
    assert (out.bounds(), out.ones()) == ([(27, 42)], ([27, 41], [35]))


def test_window_bounds_are_inclusive(tmp_path):
    turns = [
        turn("DST_UPDATE", "K1 start", 6.0, 9, 12),
        turn("assistant", "Wait.", 11.0, 19, 22),
        turn("assistant", "Wait on.", 11.5, 20, 23),
        turn("DST_UPDATE", "K1 complete", 16.0, 29, 32),
        turn("DST_UPDATE", "K2 start", 20.0, 37, 40),
    ]
    out = run(tmp_path, [tea(turns, 9, 40)])
    assert out.clips()[0]["frame_convention"] == "window"
    assert out.bounds() == [(9, 41)]
    assert out.ones() == ([19, 20, 21, 22, 23], [9, 10, 11, 12, 29, 30, 31, 32, 37, 38, 39, 40])


def test_lead_in_turns_at_time_0_happen_at_frame_0(tmp_path):
    turns = [
        turn("user", "How?", 0.0, 0, 0),
        turn("DST_UPDATE", "K1 start", 0.0, 0, 0),
        turn("assistant", "Switch it on.", 0.4, 0, 0),
        turn("assistant", "Wait.", 5.0, 0, 10),
        turn("DST_UPDATE", "K1 complete", 16.0, 10, 32),
    ]
    out = run(tmp_path, [tea(turns, 0, 32)])
    assert out.clips()[0]["frame_convention"] == "lead-in"
    assert out.ones() == ([0, 9], [0, 31])


# ---- times without frames ----------------------------------------------------------------------------


def timed(**more):
    turns = [{k: v for k, v in said.items() if k not in ("start_frame", "end_frame")} for said in TEA]
    return {"video_uid": "kitchen-1", "conversation": [{"role": "system", "content": "x"}, *turns]} | more


def test_turns_with_times_alone_happen_at_the_frame_that_shows_their_time(tmp_path):
    out = run(tmp_path, [timed(fps=2)])
    assert (out.clips()[0]["frame_convention"], out.bounds()) == ("event", [(4, 43)])
    assert out.ones() == ([4, 10, 19, 28, 42], [10, 28, 36])
    assert run(tmp_path / "fps", [timed()], fps=4.0).ones() == ([8, 20, 38, 56, 84], [20, 56, 72])
    with pytest.raises(InputError, match=r"fps.*turns have times but no frames; give --fps"):
        run(tmp_path / "none", [timed()])


# ---- the state before a clip -------------------------------------------------------------------------

DONE = {"K1": "completed", "K2": "in_progress"}
NEW = {"K1": "not_started", "K2": "not_started"}


def two_clips(repeated: int, **more):
    """The conversation cut after 14.0 s; the later clip begins with the last `repeated` turns of the earlier one."""
    first = tea(TEA[:8], 0, 28, initial_dst_state=dict(DONE), **more)
    return [first, tea(TEA[8 - repeated :], 19, 42, id="t2", clip_idx=1, initial_dst_state={}, **more)]


def test_the_state_before_a_clip_is_replayed_over_the_earlier_ones(tmp_path):
    """As generated: the first clip gives its own end as initial state, the last one nothing."""
    out = run(tmp_path, two_clips(0))
    assert out.states() == [NEW, DONE]
    assert out.hazards()["initial state contradicts the updates"].startswith("2 of 2 given initial states")
    assert run(tmp_path / "reversed", two_clips(0)[::-1]).states() == [DONE, NEW]


def test_a_clip_idx_that_does_not_rise_starts_another_conversation(tmp_path):
    """Two conversations of one user type over one video; the second one's later clip repeats updates."""
    clips = [clip | {"id": f"t{i}"} for i, clip in enumerate([*two_clips(0), *two_clips(3)])]
    assert run(tmp_path, clips).states() == [NEW, DONE, NEW, {"K1": "in_progress", "K2": "not_started"}]


def test_users_and_videos_are_told_apart(tmp_path):
    first, second = two_clips(0)
    other_user = second | {"id": "u", "metadata": {"user_id": "talk_1"}}
    other_video = second | {"id": "v", "video_uid": "kitchen-2"}
    assert run(tmp_path, [first, other_user, other_video]).states()[1:] == [{}, {}]


def test_a_given_state_that_nothing_contradicts_stays(tmp_path):
    """The first clip of what there is: its conversation began before."""
    out = run(tmp_path, [tea(TEA[8:], 28, 42, initial_dst_state=DONE)])
    assert out.states() == [DONE]
    assert "initial state contradicts the updates" not in out.hazards()


def test_a_system_turn_with_a_wrong_state_is_a_hazard(tmp_path):
    system = SYSTEM | {"content": "You help.\n\nDialogue State:\nCurrent step states - Step K1: completed, Step K2: x"}
    out = run(tmp_path, [tea(TEA, 0, 42) | {"conversation": [system, *TEA]}])
    assert out.hazards()["system turn tells a wrong state"].startswith("1 of 1 clips")
    assert "system turn tells a wrong state" not in run(tmp_path / "plain", [tea(TEA, 0, 42)]).hazards()


# ---- files that are no use ---------------------------------------------------------------------------

EVENTS = {"video_uid": "v", "fps": 2, "dst": [], "events": [{"frame_idx": 6, "speaking": 1, "response": "now"}]}
DIALOGS = {"video_uid": "v", "inferred_goal": "g", "conversations": [{"user_type": "no_talk", "conversation": []}]}
TYPED = {"video_uid": "v", "dst": [], "conversation": [{"type": "SPEAK", "time": 6.0, "content": "now"}]}


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (EVENTS, ("events without a conversation", "times are gone", "--fps 2", "sparse_sequence_generator")),
        (DIALOGS, ("generated dialogs", "no frames were made", "{split}_training.json")),
        (TYPED, ("turn 0", "role")),
        ({"video": "v"}, ("prospect", "proassist", "egoproactive", "streamo")),
    ],
    ids=["events", "dialogs", "type", "unknown"],
)
def test_what_cannot_be_used_says_why_and_costs_no_other_clip(clip, words, tmp_path):
    with pytest.raises(InputError) as error:
        run(tmp_path / "alone", [clip])
    assert len(str(error.value).splitlines()) == 1
    assert all(word in str(error.value) for word in words)
    out = run(tmp_path, [clip, tea(TEA, 0, 42)])
    assert out.ones() == (SPEAKING, UPDATES)
    assert [line["clip"] for line in out.refused()] == [0]


def test_by_products_in_a_folder_are_left_out_with_the_reason(tmp_path):
    why = {
        "train.json": "the by-product of train_training.json",
        "train_training_fixed.json": "a copy of the training file with other frame numbers",
        "train_filtered.json": "generated dialogs, for which no frames were made",
    }
    for name in ("train_training.json", "val.json", *why):
        written(tmp_path / "run" / name, [tea(TEA, 0, 42)])
    out = run_on([tmp_path / "run"], tmp_path)
    assert (len(out.clips("train")), len(out.clips("val"))) == (1, 1)
    assert {one["path"].split("/")[-1]: one["why"] for one in out.manifest["skipped"]} == why
