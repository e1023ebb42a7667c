"""Whether an output folder is what its manifest says."""

import pytest

from pipeline import output
from pipeline.errors import InputError

FRAMES_0 = "frames/split=train/part-00000.parquet"


def refusal(folder):
    with pytest.raises(InputError) as error:
        output.verify(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_edited_shard_a_cut_one_a_missing_one_and_a_stray_one_are_named(toy):
    path = toy / FRAMES_0
    body = path.read_bytes()
    path.write_bytes(body[:100] + bytes([body[100] ^ 1]) + body[101:])
    assert f"{FRAMES_0}: damaged, SHA-256 differs" in refusal(toy)
    path.write_bytes(body[:-1])
    assert f"{FRAMES_0}: {len(body) - 1} bytes, expected {len(body)}" in refusal(toy)
    path.unlink()
    assert f"{FRAMES_0}: missing" in refusal(toy)
    path.write_bytes(body)
    (toy / "clips/split=train/part-00007.parquet").write_bytes(body)
    assert "part-00007.parquet: a shard that manifest.json does not list" in refusal(toy)
