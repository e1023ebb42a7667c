from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
import re

import numpy as np
import pytest
import torch
from by_hand import clip_example, write_frames, write_shards
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from pipeline.errors import InputError
from trainer import encode as module
from trainer import vision
from trainer.encode import encode
from trainer.features import CachedFeatures, open_features
from trainer.frame_source import PixelFrames
from trainer.model import tiny_config

# video: its clips' (start, frames) by split. Needed: v0 0..7 and 12..19, v1 0..8, v2 3..9
CLIPS = {"train": [("v0", 0, 6), ("v0", 4, 4), ("v1", 0, 9), ("v0", 12, 8)], "val": [("v2", 3, 7), ("v0", 13, 2)]}
NEEDED = {"v0": [*range(8), *range(12, 20)], "v1": [*range(9)], "v2": [*range(3, 10)]}


def small_model() -> SmolVLMForConditionalGeneration:
    """Random, with 16 tokens a frame to pool from."""
    torch.manual_seed(0)
    config = tiny_config(64)
    config.scale_factor = 1
    return SmolVLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def vlm():
    return small_model()


@pytest.fixture(scope="module")
def model(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vlm.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def root(tmp_path):
    """20 frames of noise of each video: two Arrow files and a folder of images."""
    rng = np.random.default_rng(0)
    frames = {name: rng.integers(0, 256, (20, 64, 64, 3), np.uint8) for name in NEEDED}
    for name in ("v0", "v1"):
        write_frames(tmp_path / "frames" / f"{name}.arrow", list(frames[name]))
    (tmp_path / "frames" / "v2").mkdir()
    for i, frame in enumerate(frames["v2"]):
        Image.fromarray(frame).save(tmp_path / "frames" / "v2" / f"{i + 1:04d}.png")
    return tmp_path / "frames"


@pytest.fixture
def data(root, tmp_path):
    return shards(tmp_path / "data", CLIPS, root)


def shards(out, clips, root):
    made = {
        split: [
            clip_example([], start, frames, clip_id=f"{split}{i}", clip=i, video=video)
            for i, (video, start, frames) in enumerate(chosen)
        ]
        for split, chosen in clips.items()
    }
    return write_shards(out, made, root)


def files(out) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith(module.LOCK))


def live(vlm, root, video, frames, k=1) -> np.ndarray:
    source = PixelFrames(root, 64)
    pixels = np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])
    with torch.inference_mode():
        return vision.look(vlm, torch.from_numpy(pixels), k).numpy()


def cached(vlm, out, video, frames, k=1) -> np.ndarray:
    source = CachedFeatures(out, vision.fingerprint(vlm), k)
    return np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("store", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_cached_features_are_the_live_ones(vlm, model, root, data, tmp_path, store, tolerance):
    report = encode(data, tmp_path / "out", model, 4, store=store, batch=3)
    assert (report.videos, report.skipped, report.frames, report.refused, report.status) == (3, 0, 32, [], 0)
    assert (report.computed, report.probe) == ("float32", None)
    for video, frames in NEEDED.items():
        found = cached(vlm, tmp_path / "out", video, frames, 4)
        assert found.shape == (len(frames), 4, 64)
        assert found.dtype == store
        assert apart(found, live(vlm, root, video, frames, 4)) < tolerance
    pooled = cached(vlm, tmp_path / "out", "v0", [3, 14], 1)
    assert apart(pooled, live(vlm, root, "v0", [3, 14], 1)) < 2 * tolerance


def test_every_needed_frame_is_encoded_once(model, data, tmp_path, monkeypatch):
    seen = []
    original = module._see
    monkeypatch.setattr(
        module, "_see", lambda vlm, pixels, *more: seen.append(len(pixels)) or original(vlm, pixels, *more)
    )
    report = encode(data, tmp_path / "out", model, batch=5)
    assert seen == [5, 5, 5, 1, 5, 4, 5, 2]
    for video, frames in NEEDED.items():
        assert open_features(tmp_path / "out" / f"{video}.2fps.safetensors").frames.tolist() == frames
    assert report.bytes == sum((tmp_path / "out" / name).stat().st_size for name in files(tmp_path / "out"))


def test_a_killed_run_goes_on_where_it_was(vlm, model, root, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    passes = []
    original = module._see

    def until_killed(vlm, pixels, *more):
        passes.append(len(pixels))
        if len(passes) == 6:
            raise KeyboardInterrupt
        return original(vlm, pixels, *more)

    monkeypatch.setattr(module, "_see", until_killed)
    with pytest.raises(KeyboardInterrupt):
        encode(data, out, model, batch=4)  # v0 takes four passes, v1 three
    monkeypatch.setattr(module, "_see", original)
    assert files(out) == ["v0.2fps.safetensors"]
    (out / ".v1.2fps.safetensors.89abcdef.new").write_bytes(b"what kill -9 leaves")
    first = (out / "v0.2fps.safetensors").stat().st_mtime_ns
    report = encode(data, out, model, batch=4)
    assert (report.videos, report.skipped, report.frames) == (2, 1, 16)
    assert (out / "v0.2fps.safetensors").stat().st_mtime_ns == first
    assert files(out) == [f"{video}.2fps.safetensors" for video in NEEDED]
    for video, frames in NEEDED.items():
        assert apart(cached(vlm, out, video, frames), live(vlm, root, video, frames)) < 1e-3


def test_a_second_run_does_only_what_is_new(vlm, model, root, data, tmp_path):
    out = tmp_path / "out"
    encode(data, out, model)
    assert encode(data, out, model).skipped == 3
    more = shards(tmp_path / "more", {"train": [("v1", 5, 10), ("v2", 4, 2)]}, root)
    report = encode(more, out, model)
    assert (report.videos, report.skipped, report.frames) == (1, 1, 15)  # v1 0..14: the old ones stay
    assert encode(data, out, model).skipped == 3
    assert encode(data, out, model, 4).videos == 3
    assert encode(data, out, model, 4, store="float32").videos == 3
    write_frames(root / "v1.arrow", [np.zeros((64, 64, 3), np.uint8)] * 20)  # another file than before
    assert encode(data, out, model, 4, store="float32").videos == 1
    assert apart(cached(vlm, out, "v1", [2], 4), live(vlm, root, "v1", [2], 4)) < 1e-6


def test_videos_that_cannot_be_read_are_named_and_the_rest_is_done(model, root, data, tmp_path):
    (root / "v0.arrow").unlink()
    (root / "v2" / "0006.png").write_bytes(b"no image")
    report = encode(data, tmp_path / "out", model, batch=2)
    assert (report.videos, report.frames, report.status) == (1, 9, 3)
    assert files(tmp_path / "out") == ["v1.2fps.safetensors"]
    missing, broken = report.refused
    assert missing.startswith("video v0: clip train0: no frames of v0 below")
    assert broken.startswith("video v2: ")
    assert "v2 frame 5: no JPEG or PNG" in broken
    (root / "v1.arrow").write_bytes(b"no Arrow file")
    with pytest.raises(InputError, match="none of 3 videos can be encoded; video v0: clip train0: no frames"):
        encode(data, tmp_path / "other", model)


def test_of_a_short_video_what_is_there_is_encoded_and_the_rest_is_named(model, root, data, tmp_path):
    """TRAPS 7: annotations longer than the frames cost the clips that reach beyond, not the whole video."""
    write_frames(root / "v0.arrow", [np.zeros((64, 64, 3), np.uint8)] * 15)
    report = encode(data, tmp_path / "out", model, batch=2)
    assert (report.videos, report.status) == (3, 3)
    assert report.refused == ["video v0: 15 frames, but its clips need 20; those that are there are encoded"]
    frames = open_features(tmp_path / "out" / "v0.2fps.safetensors").frames
    assert frames.max() == 14


def test_a_video_whose_clips_name_two_files_is_refused(model, root, tmp_path):
    write_frames(root / "other.arrow", [np.zeros((64, 64, 3), np.uint8)] * 20)
    clips = [clip_example([], 0, 4, clip_id=f"c{i}", clip=i, video="v0") for i in range(2)]
    clips[1] = dataclasses.replace(clips[1], frames_file="other.arrow")
    data = write_shards(
        tmp_path / "data", {"train": [*clips, clip_example([], 0, 4, clip=2, clip_id="c2", video="v1")]}, root
    )
    report = encode(data, tmp_path / "out", model)
    assert report.videos == 1
    assert "video v0: its clips name several frames_files" in report.refused[0]


def test_features_too_large_for_float16_stop_the_run(data, tmp_path):
    loud = small_model()
    with torch.no_grad():
        loud.model.vision_model.post_layernorm.weight.mul_(1e6)
    loud.save_pretrained(tmp_path / "loud")
    with pytest.raises(InputError, match=r"video v0: features that are too large for float16.*use --store float32"):
        encode(data, tmp_path / "out", str(tmp_path / "loud"))
    assert not files(tmp_path / "out")
    assert encode(data, tmp_path / "out", str(tmp_path / "loud"), store="float32").videos == 3


def test_bfloat16_is_measured_and_refused_where_it_is_off(vlm, model, root, data, tmp_path, monkeypatch):
    report = encode(data, tmp_path / "out", model, dtype="bfloat16", store="float32")
    assert report.computed == "bfloat16"
    assert 1e-4 < report.probe < module.TOLERANCE
    expected = live(vlm, root, "v1", range(9))
    off = np.linalg.norm(cached(vlm, tmp_path / "out", "v1", range(9)) - expected, axis=-1)
    assert (off / np.linalg.norm(expected, axis=-1)).max() < module.TOLERANCE
    assert open_features(tmp_path / "out" / "v0.2fps.safetensors").about["computed"] == "bfloat16"
    assert encode(data, tmp_path / "out", model, dtype="float32", store="float32").videos == 3
    assert (
        encode(data, tmp_path / "out", model, dtype="bfloat16", store="float32").skipped == 3
    )  # better ones are there
    monkeypatch.setattr(module, "TOLERANCE", 1e-5)
    with pytest.raises(InputError, match=r"dtype is bfloat16, but features differ .* use --dtype float32"):
        encode(data, tmp_path / "out", model, dtype="bfloat16")


def test_two_runs_do_not_write_into_one_folder(model, data, tmp_path):
    with (
        module._alone(tmp_path / "out"),
        pytest.raises(InputError, match="out: another run of part 1/1 is writing there"),
    ):
        encode(data, tmp_path / "out", model)
    assert encode(data, tmp_path / "out", model).videos == 3


@pytest.mark.parametrize("parts", [2, 7])
def test_the_parts_together_write_what_one_run_writes(model, data, tmp_path, parts):
    encode(data, tmp_path / "whole", model, batch=3)
    reports = [encode(data, tmp_path / "parts", model, batch=3, part=(i + 1, parts)) for i in range(parts)]
    assert sum(report.videos for report in reports) == 3  # none twice, also where parts are left without any
    assert [report.refused for report in reports] == [[]] * parts
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert encode(data, tmp_path / "parts", model).skipped == 3


def test_which_part_a_video_falls_to_never_changes():
    """By SHA-256 of 'v0 2': another rule would leave videos out where an array is run again by another version."""
    digests = {name: int(hashlib.sha256(f"{name} 2".encode()).hexdigest()[:16], 16) for name in NEEDED}
    assert [module._share(clip_example([], video=name), 1000) for name in NEEDED] == [
        digest % 1000 + 1 for digest in digests.values()
    ]


def test_parts_write_into_one_folder_at_once_but_no_part_twice(model, data, tmp_path):
    out = tmp_path / "out"
    with module._alone(out, (1, 2)):
        assert encode(data, out, model, part=(2, 2)).refused == []
        with pytest.raises(InputError, match="out: another run of part 1/2 is writing there; wait for it"):
            encode(data, out, model, part=(1, 2))
        with pytest.raises(InputError, match=r"a run of another number of parts \(\.lock-1-of-2\) is writing there"):
            encode(data, out, model)
        with pytest.raises(InputError, match=r"a run of another number of parts \(\.lock-1-of-2\) is writing there"):
            encode(data, out, model, part=(1, 3))
    with (
        module._alone(out),
        pytest.raises(InputError, match=r"another number of parts \(\.lock-1-of-1\) is writing there"),
    ):
        encode(data, out, model, part=(1, 2))
    encode(data, out, model, part=(1, 3))


def test_what_a_killed_part_left_goes_with_its_next_run_and_other_parts_files_stay(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shares = {name: module._share(clip_example([], video=name), 4) for name in NEEDED}
    assert shares == {"v0": 1, "v1": 1, "v2": 3}
    for name in NEEDED:
        (out / f".{name}.2fps.safetensors.0123abcd.new").write_bytes(b"half")
    (out / ".mine").write_bytes(b"not ours")
    encode(data, out, model, part=(1, 4))
    left = {path.name.strip(".")[:2] for path in out.iterdir() if path.name.startswith(".v")}
    assert left == {"v2"}
    encode(data, out, model, part=(3, 4))
    assert files(out) == [".mine", *(f"{name}.2fps.safetensors" for name in NEEDED)]


def told(report) -> tuple:
    """All but where and how long; Pillow names an object's address."""
    refused = [re.sub("0x[0-9a-f]+", "0x", why) for why in report.refused]
    return report.videos, report.frames, report.bytes, report.skipped, refused, report.computed, report.probe


def test_a_mapper_gets_a_task_per_video_and_the_result_is_the_same(model, root, data, tmp_path):
    """Each task in a process that knows nothing: what it needs goes through pickle. One is done by two at a time."""
    (root / "v2" / "0006.png").write_bytes(b"no image")
    expected = encode(data, tmp_path / "here", model, batch=2)
    called = []

    def mapper(function, calls):
        for call in calls:
            called.append(function.__name__)
            found = [pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(call))))) for _ in range(2)]
            assert len({str(told(one)) if isinstance(one, module.EncodeReport) else one for one in found}) == 1
            yield found[1]

    report = encode(data, tmp_path / "there", model, batch=2, mapper=mapper)
    assert called == ["_choose_there", *["_do_there"] * 3]
    assert told(report) == told(expected)
    assert files(tmp_path / "there") == files(tmp_path / "here") == ["v0.2fps.safetensors", "v1.2fps.safetensors"]
    for name in files(tmp_path / "here"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_machine_with_another_tower_is_refused(model, data, tmp_path):
    def mapper(function, calls):
        for call in calls:
            how = dataclasses.replace(call[0], fingerprint="0" * 16)
            yield function(how, *call[1:])

    with pytest.raises(InputError, match=f"model is {model}: another tower on .*; give all machines the same"):
        encode(data, tmp_path / "out", model, dtype="float32", mapper=mapper)
    assert files(tmp_path / "out") == []


def test_a_run_of_ours_is_a_model(vlm, data, tmp_path):
    vlm.save_pretrained(tmp_path / "run" / "last")
    assert encode(data, tmp_path / "out", str(tmp_path / "run")).videos == 3
    about = open_features(tmp_path / "out" / "v0.2fps.safetensors").about
    assert about["fingerprint"] == vision.fingerprint(vlm)
    assert (about["layer"], about["k"], about["side"], about["source"]) == ("vision", "1", "64", "v0.arrow")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "tiny"}, "model is tiny: its tower knows nothing"),
        ({"k": 3}, "tokens_per_frame is 3, expected a square number"),
        ({"k": 25}, "tokens_per_frame is 25, but .* has 16"),
        ({"dtype": "float16"}, "dtype is 'float16', expected one of auto, float32, bfloat16"),
        ({"store": "int8"}, "store is 'int8', expected one of float16, float32"),
        ({"keep": "text"}, "keep is 'text', expected one of vision, connector"),
        ({"keep": "connector"}, "keep is connector, but .* has 128 values after it and 64 before; use --keep vision"),
        ({"batch": 0}, "batch is 0, expected above 0"),
        ({"part": (0, 4)}, "part is 0/4, expected 1/N to N/N"),
        ({"part": (5, 4)}, "part is 5/4, expected 1/N to N/N"),
        ({"part": (1, 0)}, "part is 1/0, expected 1/N to N/N"),
        ({"frames_root": "nowhere"}, "nowhere: no such folder.*--frames-root"),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(model, data, tmp_path, wrong, message):
    options = {"model": model, **wrong}
    if "frames_root" in wrong:
        options["frames_root"] = tmp_path / wrong["frames_root"]
    with pytest.raises(InputError, match=message):
        encode(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- after the connector -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A model with 4 tokens a frame of 256 values before the connector and 128 after it, and its folder."""
    torch.manual_seed(0)
    config = tiny_config(64)
    config.scale_factor = 2
    vlm, folder = SmolVLMForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("narrow")
    vlm.save_pretrained(folder)
    return vlm, str(folder)


@pytest.mark.parametrize(("store", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_the_connector_s_output_can_be_kept_instead(narrow, root, data, tmp_path, store, tolerance):
    vlm, model = narrow
    assert encode(data, tmp_path / "out", model, 4, store=store, keep="connector").videos == 3
    about = open_features(tmp_path / "out" / "v0.2fps.safetensors").about
    assert (about["layer"], about["fingerprint"]) == ("connector", vision.fingerprint(vlm, "connector"))
    for k in (4, 1):
        source = CachedFeatures(tmp_path / "out", vision.fingerprint(vlm, "connector"), k, "connector")
        found = source.load(clip_example([], video="v1"), 2, 5)
        with torch.inference_mode():
            expected = vision.project(vlm, torch.from_numpy(live(vlm, root, "v1", range(2, 5), k))).numpy()
        assert found.shape == (3, k, 128)
        assert apart(found, expected) < 2 * tolerance
    assert encode(data, tmp_path / "out", model, 4, store=store, keep="connector").skipped == 3


def test_two_layers_do_not_share_a_folder(narrow, data, tmp_path):
    _, model = narrow
    encode(data, tmp_path / "out", model, keep="connector")
    with pytest.raises(InputError, match=r"features of the layer connector, and kept; choose another --out, or --ke"):
        encode(data, tmp_path / "out", model)
    encode(data, tmp_path / "all", model)
    (tmp_path / "all" / "v0.2fps.safetensors").replace(tmp_path / "out" / "v0.2fps.safetensors")
    source = CachedFeatures(tmp_path / "out", vision.fingerprint(narrow[0], "connector"), layer="connector")
    with pytest.raises(InputError, match=r"v0.*features of the layer vision, but others in this folder of connector"):
        source.load(clip_example([], video="v0"), 0, 1)


def test_another_connector_s_features_are_refused(narrow, data, tmp_path):
    vlm, model = narrow
    encode(data, tmp_path / "out", model, keep="connector")
    was = vision.fingerprint(vlm), vision.fingerprint(vlm, "connector")
    learned = copy.deepcopy(vlm)
    with torch.no_grad():
        learned.model.connector.modality_projection.proj.weight.add_(1e-3)
    assert vision.fingerprint(learned) == was[0]
    assert vision.fingerprint(learned, "connector") != was[1]
    source = CachedFeatures(tmp_path / "out", vision.fingerprint(learned, "connector"), layer="connector")
    with pytest.raises(InputError, match=rf"made by the vision tower and connector {was[1]} .*encode again"):
        source.load(clip_example([], video="v1"), 0, 1)


def test_a_mapper_keeps_the_connector_s_output_too(narrow, data, tmp_path):
    _, model = narrow
    encode(data, tmp_path / "here", model, keep="connector")
    calls = lambda function, calls: (function(*pickle.loads(pickle.dumps(call))) for call in calls)  # noqa: E731
    encode(data, tmp_path / "there", model, keep="connector", mapper=calls)
    for name in files(tmp_path / "here"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep", ["vision", "connector"])
def test_a_gpu_encodes_what_a_cpu_does_also_where_copies_overlap(narrow, root, data, tmp_path, keep):
    vlm, model = narrow
    assert encode(data, tmp_path / "out", model, 4, dtype="float32", store="float32", batch=2, keep=keep).videos == 3
    source = CachedFeatures(tmp_path / "out", vision.fingerprint(vlm, keep), 4, keep)
    for video, frames in NEEDED.items():
        found = np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])
        expected = torch.from_numpy(live(vlm, root, video, frames, 4))
        with torch.inference_mode():
            expected = vision.project(vlm, expected) if keep == "connector" else expected
        assert apart(found, expected.numpy()) < 1e-3
    report = encode(data, tmp_path / "auto", model, batch=2, keep=keep)
    assert report.computed == "bfloat16"
    assert report.probe < module.TOLERANCE
