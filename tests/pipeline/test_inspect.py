"""The summary of hand-labelled clips, read back from shards: every number below was counted by eye."""

import pytest
from toy_folder import make_clip, text_of, write_folder

from pipeline import inspect, output, summary
from pipeline.errors import InputError


def test_counts_of_hand_labelled_clips(toy):
    train, val = inspect.summarise(toy).splits
    assert (train.name, train.clips, train.recordings, train.frames) == ("train", 2, 2, 18)
    assert train.hours == pytest.approx(9 / 3600)
    cells = (train.speak_only, train.dst_only, train.both, train.silence, train.not_sampled)
    assert cells == (4, 0, 2, 7, 5)
    assert train.supervised == pytest.approx(13 / 18)
    assert train.first == 1
    speaking = summary.Head(positives=6, frames=18, supervised=13, clips=2, gaps={2.0: 1}, usual_gap=(2.0, 1, 1))
    assert train.heads["speaking"] == speaking
    assert speaking.median_gap == 2.0
    assert (val.speak_only, val.dst_only, val.both, val.silence, val.not_sampled) == (1, 2, 0, 3, 0)
    assert val.hours == pytest.approx(1.5 / 3600)


def test_a_clip_without_dst_says_nothing_about_that_head(toy):
    dst = inspect.summarise(toy).splits[0].heads["dst_update"]
    assert dst == summary.Head(positives=2, frames=10, supervised=7, clips=1, gaps={3.0: 1}, usual_gap=(3.0, 1, 1))


def test_gaps_do_not_reach_from_one_clip_to_the_next(tmp_path):
    clips = [make_clip(f"c{i}", "1000", "0000") for i in range(3)]
    speaking = inspect.summarise(write_folder(tmp_path, {"train": clips})).splits[0].heads["speaking"]
    assert speaking.gaps == {}
    assert speaking.median_gap is None


def test_parts_do_not_change_the_summary(tmp_path):
    clips = [make_clip(f"c{i}", "10010" * (i + 1), "01000" * (i + 1), start=7 * i) for i in range(5)]
    one = write_folder(tmp_path / "one", {"train": clips}, parts=1)
    three = write_folder(tmp_path / "three", {"train": clips}, parts=3)
    assert inspect.summarise(one) == inspect.summarise(three)


def test_hazards_the_shards_show(toy):
    found = {(h["name"], h["split"]): h["text"] for h in inspect.summarise(toy).hazards}
    assert set(found) == {
        ("heads coincide", "train"),
        ("events at the first frame", "val"),
        ("recording in several splits", "train+val"),
    }
    assert found["heads coincide", "train"].startswith("2 of 2 DST frames are positive for both heads")
    assert found["events at the first frame", "val"].startswith("1 of 1 clips begin on an event")
    assert "e.g. rec-1" in found["recording in several splits", "train+val"]


def test_implausible_rates_and_empty_heads_are_hazards(tmp_path):
    folder = write_folder(tmp_path, {"train": [make_clip("a", "0111", "...."), make_clip("b", "0111", "....")]})
    names = [h["name"] for h in inspect.summarise(folder).hazards]
    assert names == ["implausible positive rate", "head without positives"]


def test_summary_table_fits_100_columns_and_tells_drops_and_hazards(toy):
    manifest = {
        "splits": {"train": {"drops": {"outside the clip": 1, "empty range": 0}}},
        "hazards": [
            {
                "name": "frames missing",
                "split": "train",
                "text": "3 videos are shorter than their annotations",
            }
        ],
        "inputs": [
            {"path": "/x/train_t.json", "split": "train", "clips": 2, "frame_convention": "event", "quarantined": 1}
        ],
    }
    text = text_of(summary.render_summary(inspect.summarise(toy), manifest))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["supervised", "frames", "72.2%", "100.0%"] for line in lines)
    assert any(line.split() == ["dropped:", "outside", "the", "clip", "1", "-"] for line in lines)
    assert "empty range" not in text
    assert "train_t.json: 2 train clips, event convention, 1 quarantined" in lines
    assert "hazard [train] 3 videos are shorter than their annotations" in lines
    assert sum("hazard" in line for line in lines) == 4


def test_a_hazard_in_the_manifest_is_not_told_twice(toy):
    found = inspect.summarise(toy)
    told = [{"name": "heads coincide", "split": "train", "text": "as preprocess says"}]
    texts = [h["text"] for h in summary.all_hazards(found, {"hazards": told})]
    assert "as preprocess says" in texts
    assert len(texts) == 3


FRAMES_0 = "frames/split=train/part-00000.parquet"


def refusal(folder):
    with pytest.raises(InputError) as error:
        output.verify(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_edited_shard_is_named(toy):
    path = toy / FRAMES_0
    body = bytearray(path.read_bytes())
    body[100] ^= 1
    path.write_bytes(body)
    assert f"{FRAMES_0}: damaged, SHA-256 differs" in refusal(toy)


def test_a_cut_shard_a_missing_one_and_a_stray_one_are_named(toy):
    body = (toy / FRAMES_0).read_bytes()
    (toy / FRAMES_0).write_bytes(body[:-1])
    assert f"{FRAMES_0}: {len(body) - 1} bytes, expected {len(body)}" in refusal(toy)
    (toy / FRAMES_0).unlink()
    assert f"{FRAMES_0}: missing" in refusal(toy)
    (toy / FRAMES_0).write_bytes(body)
    (toy / "clips/split=train/part-00007.parquet").write_bytes(body)
    assert "part-00007.parquet: a shard that manifest.json does not list" in refusal(toy)


def test_no_manifest_is_no_finished_output(tmp_path):
    assert "manifest.json: not found" in refusal(tmp_path)


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no shards here"):
        inspect.summarise(tmp_path)


@pytest.mark.parametrize(
    ("counts", "median"), [({}, None), ({3.0: 1}, 3.0), ({1.0: 1, 9.0: 1}, 1.0), ({1.0: 1, 2.0: 5}, 2.0)]
)
def test_weighted_median(counts, median):
    assert summary.Head(0, 0, 0, 0, (0.0, 0, 0), counts).median_gap == median
