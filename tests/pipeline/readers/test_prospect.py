"""Training files as the public generators write them: fields, bounds, states, conventions, and what is no use."""

import pytest
from made_up import SYSTEM, TEA, run, run_on, tea, turn, written

from pipeline.errors import InputError

SPEAKING, UPDATES = [3, 9, 18, 27, 41], [9, 27, 35]


def test_descriptive_fields_are_read_leniently_and_what_is_ignored_is_counted(tmp_path):
    steps = [{"id": "K1", "name": 5}, {"id": "K2", "name": ["pour", "it"]}]
    more = [
        {"inferred_knowledge": 7, "inferred_goal": {"a": 1}, "dataset": 5, "dst": steps},
        {"metadata": "no_talk", "inferred_goal": ["make", "tea"]},
        *({"metadata": {"knowledge": given, "task_goal": "tea"}} for given in ([], "boil", ["1. boil", "2. pour"])),
    ]
    out = run(tmp_path, [tea(TEA, 0, 42, **{"id": f"t{i}"} | fields) for i, fields in enumerate(more)])
    ignored = {"dataset": 1, "dst.name": 1, "inferred_goal": 1, "inferred_knowledge": 1, "metadata": 1}
    assert out.manifest["inputs"][0]["ignored_fields"] == ignored
    rows = out.clips()
    assert [row["goal"] for row in rows] == [None, "make\ntea", "tea", "tea", "tea"]
    assert [row["knowledge"] for row in rows] == [None, None, None, "boil", "1. boil\n2. pour"]
    assert rows[0]["dataset"] == "unknown"
    assert rows[0]["steps"] == [{"id": "K1", "name": ""}, {"id": "K2", "name": "pour\nit"}]
    assert out.ones() == (SPEAKING, UPDATES)


@pytest.mark.parametrize(("option", "bounds"), [("auto", (0, 42)), ("given", (4, 36)), ("turns", (0, 42))])
def test_bounds_of_dst_turns_alone_are_widened_to_all_turns(option, bounds, tmp_path):
    out = run(tmp_path, [tea(TEA, 4, 36)], bounds=option)
    assert out.bounds() == [bounds]
    assert out.manifest["inputs"][0]["bounds_widened"] == (option != "given")


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


DONE = {"K1": "completed", "K2": "in_progress"}
NEW = {"K1": "not_started", "K2": "not_started"}


def two_clips(repeated: int):
    """The conversation cut after 14.0 s; the later clip begins with the last `repeated` turns of the earlier one."""
    first = tea(TEA[:8], 0, 28, initial_dst_state=dict(DONE))
    return [first, tea(TEA[8 - repeated :], 19, 42, id="t2", clip_idx=1, initial_dst_state={})]


def test_step_ids_may_be_numbers(tmp_path):
    update = {"role": "DST_UPDATE", "content": [{"id": 1, "transition": "start"}], "start_frame": 3, "end_frame": 4}
    out = run(tmp_path, [tea([update], 0, 9, dst=[{"id": 1, "name": "boil"}])])
    assert out.clips()[0]["turns"][1]["updates"] == [{"id": "1", "transition": "start"}]
    assert out.clips()[0]["steps"] == [{"id": "1", "name": "boil"}]


def test_the_state_before_a_clip_is_replayed_over_the_earlier_ones(tmp_path):
    """As generated: the first clip gives its own end as initial state, the last one nothing."""
    out = run(tmp_path, two_clips(0))
    assert out.states() == [NEW, DONE]
    assert out.hazards()["initial state contradicts the updates"].startswith("2 of 2 given initial states")
    assert run(tmp_path / "reversed", two_clips(0)[::-1]).states() == [DONE, NEW]
    # its conversation began before the file; no update contradicts its initial state, which stands
    assert run(tmp_path / "given", [tea(TEA[8:], 28, 42, initial_dst_state=DONE)]).states() == [DONE]
    # a clip_idx that does not rise starts another conversation over the same video; its later clip repeats updates
    clips = [clip | {"id": f"t{i}"} for i, clip in enumerate([*two_clips(0), *two_clips(3)])]
    assert run(tmp_path / "two", clips).states() == [NEW, DONE, NEW, {"K1": "in_progress", "K2": "not_started"}]


def test_a_system_turn_with_a_wrong_state_is_a_hazard(tmp_path):
    system = SYSTEM | {"content": "You help.\n\nDialogue State:\nCurrent step states - Step K1: completed, Step K2: x"}
    out = run(tmp_path, [tea(TEA, 0, 42) | {"conversation": [system, *TEA]}])
    assert out.hazards()["system turn tells a wrong state"].startswith("1 of 1 clips")
    assert "system turn tells a wrong state" not in run(tmp_path / "plain", [tea(TEA, 0, 42)]).hazards()


def test_an_answer_that_an_earlier_user_turn_holds_is_a_hazard(tmp_path):
    def told(order):
        words = {"user": "(say: the kettle is full enough)", "assistant": "the kettle is full enough"}
        turns = [turn(role, words[role], 1.0, 2, 4) for role in order]
        return run(tmp_path / order[0], [tea([*turns, *TEA], 0, 42)], frame_convention="event").hazards()

    assert told(["user", "assistant"])["user turns tell the answers"].startswith("1 of ")
    assert "user turns tell the answers" not in told(["assistant", "user"])


EVENTS = {"video_uid": "v", "fps": 2, "dst": [], "events": [{"frame_idx": 6, "speaking": 1, "response": "now"}]}
TYPED = {"video_uid": "v", "conversation": [{"type": "assistant", "content": "x", "start_frame": 1, "end_frame": 2}]}
DIALOGS = {"video_uid": "v", "inferred_goal": "g", "conversations": [{"user_type": "no_talk", "conversation": []}]}


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (EVENTS, ("events without a conversation", "times are gone", "--fps 2", "sparse_sequence_generator")),
        (DIALOGS, ("generated dialogs", "no frames were made", "{split}_training.json")),
        (TYPED, ("turn 0: role: found type in its place", "a later one's {split}_training.json")),
        ({"video": "v"}, ("prospect", "proassist", "egoproactive", "streamo")),
    ],
)
def test_what_cannot_be_used_says_why_and_costs_no_other_clip(clip, words, tmp_path):
    with pytest.raises(InputError) as error:
        run(tmp_path / "alone", [clip])
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
