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
    tables = []
    for clip in split.in_order():
        rows = {"split": "test", "clip_id": clip.clip_id, "frame": range(clip.start_frame, clip.end_frame)}
        rows |= {"speaking_logit": np.arange(clip.num_frames) / 2, "speaking_label": clip.labels[0].tolist()}
        tables.append(pl.DataFrame(rows))
    return pl.concat(tables)


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
    assert a.probabilities["speaking"].tolist() == np.float32([0.0, 0.01, 0.02, 0.03]).tolist()
    assert ("dst_update" in a.probabilities, a.said, a.updates) == (False, None, None)
    assert b.clip.labels.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert read_info(path) == {"mode": "x", "thresholds": {"speaking": 0.5}}
    assert pl.read_parquet(path)["time_s"].to_list()[:2] == [5.0, 5.5]
    assert pq.read_schema(path).names == [
        "split", "clip_id", "recording_id", "frame", "time_s", "speaking_logit", "dst_update_logit",
        "speaking_probability", "dst_update_probability", "speaking_label", "dst_update_label",
    ]  # fmt: skip


def test_what_a_free_running_model_said_and_updated_comes_back(tmp_path, split):
    b, a = scored(split)
    b = replace(b, said=[None, "", "Now, ürgent", None, None, None], updates=[(("S1", "start"),), (), *[None] * 4])
    a = replace(a, said=[None] * 4, updates=[None] * 4)
    write_scores(tmp_path / "s.parquet", {"test": [b, a]}, {})
    silent, live = read_scores(tmp_path / "s.parquet", {"test": split})["test"]
    assert (silent.said, silent.updates) == ([None] * 4, [None] * 4)
    assert (live.said, live.updates) == (b.said, b.updates)


def test_rows_of_any_order_and_types_are_read_the_same(tmp_path, split):
    plain = frame(split)
    strange = plain.sample(fraction=1, shuffle=True, seed=3).with_columns(
        pl.col("clip_id", "split").cast(pl.Categorical),
        pl.col("frame").cast(pl.Float64),
        pl.col("speaking_label").cast(pl.Int64),
        pl.lit("ignored").alias("model"),
    )
    position = plain.with_columns(clip=pl.col("clip_id").replace_strict({"b": 0, "a": 1})).drop("clip_id")
    other = pl.concat([plain.with_columns(split=pl.lit("dev")), plain, plain.with_columns(split=pl.lit(None))])
    for table in (plain, strange, other, plain.drop("split"), plain.drop("speaking_label"), position):
        a, b = read(tmp_path, table, split)
        assert (a.clip.clip_id, a.logits["speaking"].tolist()) == ("a", [0, 0.5, 1, 1.5])
        assert b.logits["speaking"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert (set(b.logits), b.probabilities) == ({"speaking"}, {})


def test_texts_as_string_views_are_read_in_any_order(tmp_path, split):
    """As DataFusion and polars have them."""
    said = pl.when(pl.col("frame") == 12).then(pl.lit("Now.")).alias("said")
    table = frame(split).reverse().with_columns(said).to_arrow()
    for name in ("split", "clip_id", "said"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string_view()))
    pq.write_table(table, tmp_path / "s.parquet")
    _, b = read_scores(tmp_path / "s.parquet", {"test": split})["test"]
    assert b.said == [None, None, "Now.", None, None, None]


def test_infinite_logits_and_certain_probabilities_become_large_finite_logits(tmp_path, split):
    table, largest = frame(split), float(np.float32(1e30))
    infinite = table.with_columns(pl.col("speaking_logit").replace({0.5: math.inf, 1.0: -math.inf}))
    assert read(tmp_path, infinite, split)[0].logits["speaking"].tolist() == [0, largest, -largest, 1.5]
    certain = table.drop("speaking_logit").with_columns(speaking_probability=pl.Series([0.0, 1.0] + [0.75] * 8))
    b = read(tmp_path, certain, split)[1]
    assert b.probabilities["speaking"].tolist() == [0, 1, 0.75, 0.75, 0.75, 0.75]
    assert b.logits["speaking"][:3].tolist() == [-largest, largest, pytest.approx(math.log(3), rel=1e-6)]


REFUSED = {
    "missing": (
        lambda t: t.filter(~pl.col("frame").is_in([11, 12])),
        "scores.parquet split test: 2 frames have no row; the first is clip b frame 11",
    ),
    "relative": (
        lambda t: t.with_columns(pl.col("frame") - pl.col("frame").min().over("clip_id")),
        "6 rows are of frames that the shards lack; the first is clip b frame 0 (frames are absolute",
    ),
    "labels one frame late": (
        lambda t: t.with_columns(pl.col("speaking_label").shift(1, fill_value=0)),
        "4 frames have another speaking_label in the shards; the first is clip a frame 2",
    ),
    "NaN": (
        lambda t: t.with_columns(pl.col("speaking_logit").replace({2.5: math.nan})),
        "1 frames have no speaking_logit; the first is clip b frame 15",
    ),
    "logits named probability": (
        lambda t: t.rename({"speaking_logit": "speaking_probability"}),
        "frames have a speaking_probability beyond 0 to 1: are these logits?",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_the_shards_is_refused(tmp_path, split, name):
    spoil, message = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read(tmp_path, spoil(frame(split)), split)
    assert message in str(refused.value)
