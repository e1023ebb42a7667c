"""EgoProactive sessions: chunks to frames, answers to events, gaps to nothing, and what `dialog` gives away."""

from made_up import run


def session(video, query, intervals, answers, leak=True):
    history, dialog = [{"role": "user", "text": query}], []
    for answer in answers:
        dialog.append(list(history))
        history += [{"role": "assistant", "text": answer}] * (leak and answer.startswith("$interrupt$"))
    named = {"video_path": video, "query": query, "domain": "Repair", "task": "Patching a tyre"}
    named |= {"duration_in_sec": intervals[-1][1], "video_intervals": intervals}
    return named | {"answers": answers, "dialog": dialog}


SAID = ["$interrupt$Gravel.", "$interrupt$ Soil. ", "$silent$", "$silent$", "$interrupt$x", ""]
POTS = ["pots.mp4", "How?", [[0.0, 2.0], [10.4, 18.4], [18.4, 26.4], [42.4, 50.4], [75.9, 83.9], [83.9, 91.9]], SAID]
TEE = ["val/tee.mp4", "Tee?", [[0.25, 8.25], [8.25, 16.25]], ["$interrupt$Wasser.", " \n$interrupt$Aufgießen."]]


def spread(*ranges):
    return {frame: label for start, end, label in ranges for frame in range(start, end)}


def test_every_frame_of_two_sessions(tmp_path):
    """Three more, with the same expectations, are in ../shared/cases."""
    out = run(tmp_path, [session(*POTS), session(*TEE)], "val.jsonl")
    assert out.bounds("val") == [(0, 184), (0, 33)]
    assert out.labels("val", 0)["speaking"] == spread(
        (0, 4, 1), (4, 21, -100), (21, 37, 1), (37, 53, 0), (53, 85, -100), (85, 101, 0), (101, 152, -100),
        (152, 168, 1), (168, 184, 0),
    )  # fmt: skip
    assert out.labels("val", 1)["speaking"] == spread((0, 1, -100), (1, 33, 1))
    rows = out.clips("val")
    assert [(row["video_uid"], row["frames_file"]) for row in rows] == [("pots", "pots.mp4"), ("tee", "val/tee.mp4")]
    assert [(t["role"], t["text"], t["start_frame"], t["end_frame"]) for t in rows[0]["turns"]] == [
        ("user", "How?", 0, 1),  # the query, at the first chunk
        ("assistant", "Gravel.", 0, 4),
        ("assistant", "Soil.", 21, 37),
        ("assistant", "x", 152, 168),
    ]
    assert out.manifest["splits"]["val"]["speaking_frames"] == 184 - 17 - 32 - 51 + 32
    assert out.hazards()["dialog history tells the answers"].startswith("6 of 6 speaking decisions")


def test_at_a_lower_rate_gaps_stay_out_and_onsets_are_the_chunks_first_frames(tmp_path):
    out = run(tmp_path, [session(*POTS, leak=False)], "train.jsonl", positive="onset", neg_rate={"*": 0.0})
    assert out.ones("train", 0) == ([0, 21, 152], [])
    assert set(out.labels("train", 0)["speaking"].values()) == {1, -100}
    assert "dialog history tells the answers" not in out.hazards()
