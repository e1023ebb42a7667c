from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, dst, turn, write_shards

from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.evaluation.scores import ScoredClip, read_info, read_scores, write_scores

CLIPS = [
    clip_example([turn("assistant", "Now the wheel.", 12, 14), dst(12, 13, ("S1", "start"))], 10, 6, clip_id="b"),
    clip_example([turn("assistant", "Done.", 2, 3)], 0, 4, clip_id="a", clip=1, video="v1"),
]
VAL = [clip_example([dst(1, 2, ("S1", "start"))], 0, 3, clip_id="v", video="v2")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "labels", {"test": CLIPS, "val": VAL})


@pytest.fixture(scope="module")
def split(data):
    return Split(data, "test")


def scored(split):
    """Clips as on disk; the logit of a frame is its number, the second head's is minus that."""
    clips = []
    for clip in split.in_order():
        frame = np.arange(clip.start_frame, clip.end_frame, dtype=np.float32)
        clips.append(ScoredClip(clip, {"speaking": frame, "dst_update": -frame}, {"speaking": frame / 100}))
    return clips


def frame(split):
    """Another program's file with the fewest columns."""
    return pl.concat(
        pl.DataFrame(
            {
                "split": "test",
                "clip_id": clip.clip_id,
                "clip": clip.clip,
                "frame": range(clip.start_frame, clip.end_frame),
                "speaking_logit": [0.5 * i for i in range(clip.num_frames)],
                "speaking_label": clip.labels[0].tolist(),
            }
        )
        for clip in split.in_order()
    )


def read(path, table, split):
    table.write_parquet(path / "scores.parquet")
    return read_scores(path / "scores.parquet", {"test": split})["test"]


def test_what_is_written_is_read_in_the_order_of_clip_ids(tmp_path, data, split):
    val, path = Split(data, "val"), tmp_path / "s.parquet"
    write_scores(path, {"val": scored(val), "test": scored(split)}, {"mode": "x", "thresholds": {"speaking": 0.5}})
    found = read_scores(path, {"test": split, "val": val})
    a, b = found["test"]
    assert [a.clip.clip_id, b.clip.clip_id, found["val"][0].clip.clip_id] == ["a", "b", "v"]
    assert b.logits["speaking"].tolist() == [10, 11, 12, 13, 14, 15]
    assert b.logits["dst_update"].tolist() == [-10, -11, -12, -13, -14, -15]
    assert b.logits["speaking"].dtype == np.float32
    assert a.probabilities["speaking"].tolist() == np.float32([0.0, 0.01, 0.02, 0.03]).tolist()
    assert ("dst_update" in a.probabilities, a.said, a.updates) == (False, None, None)
    assert b.clip.labels.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert read_info(path) == {"mode": "x", "thresholds": {"speaking": 0.5}}
    rows, schema = pl.read_parquet(path), pq.read_schema(path)
    assert rows["clip_id"].to_list() == ["b"] * 6 + ["a"] * 4 + ["v"] * 3
    assert rows["time_s"].to_list()[:2] == [5.0, 5.5]
    assert rows["recording_id"].unique(maintain_order=True).to_list() == ["v0", "v1", "v2"]
    assert schema.names == [
        "split", "clip_id", "recording_id", "frame", "time_s", "speaking_logit", "dst_update_logit",
        "speaking_probability", "dst_update_probability", "speaking_label", "dst_update_label",
    ]  # fmt: skip
    assert all(field.metadata[b"doc"] for field in schema)


def test_a_head_that_the_model_lacks_is_absent(tmp_path, split):
    clips = [replace(s, logits={"speaking": s.logits["speaking"]}, probabilities={}) for s in scored(split)]
    write_scores(tmp_path / "s.parquet", {"test": clips}, {})
    assert all(set(s.logits) == {"speaking"} for s in read_scores(tmp_path / "s.parquet", {"test": split})["test"])


def test_what_a_free_running_model_said_and_updated_comes_back(tmp_path, split):
    b, a = scored(split)
    b = replace(b, said=[None, "", "Now, ürgent", None, None, None], updates=[(("S1", "start"),), (), *[None] * 4])
    a = replace(a, said=[None] * 4, updates=[None] * 4)
    write_scores(tmp_path / "s.parquet", {"test": [b, a]}, {})
    silent, live = read_scores(tmp_path / "s.parquet", {"test": split})["test"]
    assert (silent.said, silent.updates) == ([None] * 4, [None] * 4)
    assert live.said == [None, "", "Now, ürgent", None, None, None]
    assert live.updates == [(("S1", "start"),), (), None, None, None, None]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, split):
    path = tmp_path / "s.parquet"
    write_scores(path, {"test": scored(split)}, {})
    old = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_scores(path, {"test": scored(split)}, {"x": math.nan})
    assert (path.read_bytes(), list(tmp_path.glob(".*"))) == (old, [])


def test_string_views_are_texts(tmp_path, split):
    """As DataFusion writes them."""
    text = pa.string_view()
    update = pa.list_(pa.struct([("id", text), ("transition", text)]))
    table = frame(split).select("split", "clip_id", "frame", "speaking_logit").reverse().to_arrow()
    for name in ("split", "clip_id"):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(table[name].to_pylist(), text))
    said, updates = [None] * 9 + ["Now."], [None] * 9 + [[{"id": "S1", "transition": "start"}]]
    table = table.append_column("said", pa.array(said, text)).append_column("updates", pa.array(updates, update))
    pq.write_table(table, tmp_path / "s.parquet")
    silent, live = read_scores(tmp_path / "s.parquet", {"test": split})["test"]
    assert live.logits["speaking"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert (silent.said, live.said) == ([None] * 4, ["Now.", *[None] * 5])  # the last row is the first frame of b
    assert live.updates == [(("S1", "start"),), *[None] * 5]


def test_rows_of_any_order_and_types_are_read_the_same(tmp_path, split):
    plain = frame(split)
    strange = plain.sample(fraction=1, shuffle=True, seed=3).with_columns(
        pl.col("clip_id", "split").cast(pl.Categorical),
        pl.col("frame").cast(pl.Float64),
        pl.col("speaking_label").cast(pl.Int64),
        pl.lit("ignored").alias("model"),
    )
    other = pl.concat([plain.with_columns(split=pl.lit("dev")), plain, plain.with_columns(split=pl.lit(None))])
    for table in (plain, strange, other, plain.drop("split"), plain.drop("clip_id"), plain.drop("speaking_label")):
        a, b = read(tmp_path, table, split)
        assert (a.clip.clip_id, a.logits["speaking"].tolist()) == ("a", [0, 0.5, 1, 1.5])
        assert b.logits["speaking"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert (set(b.logits), b.probabilities) == ({"speaking"}, {})


def test_infinite_logits_and_certain_probabilities_become_large_finite_logits(tmp_path, split):
    table, largest = frame(split), float(np.float32(1e30))
    infinite = table.with_columns(pl.col("speaking_logit").replace({0.5: math.inf, 1.0: -math.inf}))
    assert read(tmp_path, infinite, split)[0].logits["speaking"].tolist() == [0, largest, -largest, 1.5]
    certain = table.drop("speaking_logit").with_columns(speaking_probability=pl.Series([0.0, 1.0] + [0.75] * 8))
    b = read(tmp_path, certain, split)[1]
    assert b.probabilities["speaking"].tolist() == [0, 1, 0.75, 0.75, 0.75, 0.75]
    assert b.logits["speaking"][:3].tolist() == [-largest, largest, pytest.approx(math.log(3), rel=1e-6)]


def test_what_either_side_leaves_open_is_no_contradiction(tmp_path, split):
    unlabelled = frame(split).with_columns(speaking_label=pl.lit(-100))
    unlabelled[2, "speaking_label"] = None
    assert len(read(tmp_path, unlabelled, split)) == 2
    ties = frame(split).with_columns(  # 1.0 and 1 - 1e-7 differ by rounding
        speaking_logit=pl.Series([20.0 + i for i in range(10)]),
        speaking_probability=pl.Series([1.0] * 9 + [1.0 - 1e-7]),
    )
    assert read(tmp_path, ties, split)[1].probabilities["speaking"][0] == 1.0
    onset = clip_example([turn("assistant", "x", 1, 3)], 0, 4, positive="onset")  # labels 0, 1, -100, 0
    onsets = Split(write_shards(tmp_path / "onset", {"test": [onset]}), "test")
    assert len(read(tmp_path, frame(onsets).with_columns(speaking_label=pl.Series([0, 1, 1, 0])), onsets)) == 1


def with_probability(table, *values):
    return table.with_columns(speaking_probability=pl.Series([*values, *[0.9] * (len(table) - len(values))]))


SPOILED = {
    "missing": (
        lambda t: t.filter(~pl.col("frame").is_in([11, 12])),
        "s.parquet split test: 2 frames have no row, the first is clip b frame 11; expected one row",
    ),
    "double": (
        lambda t: pl.concat([t, t[2:3], t[2:3]]),
        "2 rows are of a frame that has one already, the first is clip b frame 12",
    ),
    "relative": (
        lambda t: t.with_columns(pl.col("frame") - pl.col("frame").min().over("clip_id")),
        "6 rows are of no frame of their clip, the first is clip b frame 0, expected 10 to 15; frames are absolute",
    ),
    "unknown clip": (
        lambda t: t.with_columns(pl.col("clip_id").replace({"a": "z"})),
        "4 rows are of clips that the shards lack, the first is clip z",
    ),
    "unknown position": (
        lambda t: t.drop("clip_id").with_columns(clip=pl.col("clip") + 1),
        "4 rows are of clips that the shards lack, the first is clip 2",
    ),
    "labels one frame late": (
        lambda t: t.with_columns(pl.col("speaking_label").shift(1, fill_value=0)),
        "split test: clip a frame 2: speaking_label is 0, the shards say 1 (4 frames differ)",
    ),
    "NaN": (
        lambda t: t.with_columns(pl.col("speaking_logit").replace({2.5: math.nan})),
        "clip b frame 15: speaking_logit is NaN or null (1 such frames)",
    ),
    "null": (
        lambda t: t.with_columns(pl.col("speaking_logit").replace({2.5: None})),
        "clip b frame 15: speaking_logit is NaN or null (1 such frames)",
    ),
    "all null": (
        lambda t: t.with_columns(speaking_logit=pl.lit(None, pl.Float32)),
        "the speaking scores are null throughout",
    ),
    "no probability": (
        lambda t: with_probability(t.drop("speaking_logit"), 0.5, 1.5),
        "clip b frame 11: speaking_probability is 1.5, expected 0 to 1; if these are logits, name the column speaking_",
    ),
    "contradiction": (
        lambda t: with_probability(t, 0.9, 0.8),
        "order the frames differently (clip b frame 11 has 0.8, a frame of a lower logit 0.9); drop the column "
        "speaking_probability, or speaking_logit if the prob",
    ),
    "no score": (
        lambda t: t.drop("speaking_logit"),
        "no column speaking_logit (or speaking_probability), found split, clip_id, clip, frame, speaking_label",
    ),
    "no clip": (lambda t: t.drop("clip_id", "clip"), "no column clip, found"),
    "other split": (lambda t: t.with_columns(split=pl.lit("dev")), "no rows of split 'test', found: dev"),
    "text": (lambda t: t.with_columns(speaking_logit=pl.lit("high")), "speaking_logit is "),
    "fraction": (lambda t: t.with_columns(frame=pl.col("frame") + 0.5), "frame is double, expected int64"),
    "no rows": (lambda t: t[:0].drop("split"), "10 frames have no row, the first is clip a frame 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_file_that_does_not_fit_the_shards_is_refused(tmp_path, split, name):
    spoil, message = SPOILED[name]
    path = tmp_path / "s.parquet"
    spoil(frame(split)).write_parquet(path)
    with pytest.raises(InputError) as refused:
        read_scores(path, {"test": split})
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_file_of_which_nothing_can_be_read_is_refused(tmp_path, data, split):
    frame(split).drop("split").write_parquet(tmp_path / "s.parquet")
    with pytest.raises(InputError, match="no column split"):
        read_scores(tmp_path / "s.parquet", {"test": split, "val": Split(data, "val")})
    with pytest.raises(InputError, match=r"none\.parquet: not found"):
        read_scores(tmp_path / "none.parquet", {"test": split})
    (tmp_path / "s.csv").write_text("clip_id,frame\n")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_scores(tmp_path / "s.csv", {"test": split})


def test_a_flipped_byte_is_never_another_score(tmp_path, split):
    path = tmp_path / "s.parquet"
    write_scores(path, {"test": scored(split)}, {"mode": "teacher-forced", "threshold": 0.25})
    given = [one.logits["speaking"].tolist() for one in read_scores(path, {"test": split})["test"]]
    content, refused = path.read_bytes(), 0
    for at in range(100, 2000, 190):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert [one.logits["speaking"].tolist() for one in read_scores(path, {"test": split})["test"]] == given
        except InputError as error:
            refused += "s.parquet" in str(error)
    assert refused > 5
