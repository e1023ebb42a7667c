"""Packs come ahead of their use: from workers within shared memory, and onto a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_run import CONFIG, clip

from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.frame_source import PixelFrames
from trainer.loader import StepData, Transfer, _workers_that_fit, step_packs, uploaded
from trainer.packing import Loaded, blank_pack

GPU = torch.device("cuda")


def numbered(number: int):
    blank = blank_pack(clip(0), SimpleNamespace(image=0), None, 1)
    return replace(blank, frames=Loaded(torch.full((1, 1, 4), float(number))))


@pytest.mark.gpu
def test_copies_on_a_gpu_are_those_values_however_far_the_host_runs_ahead():
    transfer = Transfer(GPU)
    weight = torch.eye(2048, device=GPU)
    results = []
    for number in range(200):  # memory of finished copies is used again: a race would show as another number
        [value] = transfer.up([torch.full((2048, 2048), float(number))])()
        results.append(transfer.down((value @ weight @ weight)[:2]))
        del value
    for number, take in enumerate(results):
        assert torch.equal(take(), torch.full((2, 2048), float(number)))
    steps = [[numbered(2 * i), numbered(2 * i + 1)] for i in range(50)]
    found = [int(pack.to(GPU).frames()[0, 0, 0]) for step in uploaded(steps, transfer) for pack in step]
    assert found == list(range(100))


def test_workers_are_as_many_as_shared_memory_holds_and_too_little_is_told_in_one_line(
    data, tokens, monkeypatch, capsys
):
    """A step of 3 clips has at most 3 x 14 frames of 3 x 64 x 64 bytes: one worker takes 4 times that."""
    steps = StepData(Split(data, "train"), tokens, PixelFrames(data / "frames-on-disk", 64), CONFIG)
    free = SimpleNamespace(f_frsize=1, f_bavail=12 * 42 * 12288)
    monkeypatch.setattr("trainer.loader.os.statvfs", lambda path: free)
    coming = range(CONFIG.steps)
    assert (_workers_that_fit(steps, coming, 1, True), _workers_that_fit(steps, coming, 8, True)) == (1, 2)
    free.f_bavail = 1_000_000
    with pytest.raises(InputError, match=r"a worker 2 MB, but /dev/shm has 1 MB free; .*--workers 0"):
        _workers_that_fit(steps, coming, 1, True)
    capsys.readouterr()
    assert _workers_that_fit(steps, coming, 8, asked=False) == 0
    assert capsys.readouterr().err.endswith("a worker 2 MB, but /dev/shm has 1 MB free: 0 workers, not 8\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("received 0 items of ancdata"), RuntimeError("limit using `ulimit -n` in"), EOFError()]
)
def test_too_few_open_files_are_told_in_one_line(data, tokens, monkeypatch, error):
    steps = StepData(Split(data, "train"), tokens, PixelFrames(data / "frames-on-disk", 64), CONFIG)

    def refused(*_, **__):
        raise error
        yield

    monkeypatch.setattr("trainer.loader.DataLoader", refused)
    with pytest.raises(InputError, match=r"too few files may be open \(ulimit -n\); .*, or use --workers 0"):
        next(step_packs(steps, 0, 1))
