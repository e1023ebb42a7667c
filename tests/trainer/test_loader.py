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
from trainer.loader import StepData, Transfer, _workers_that_fit, uploaded
from trainer.packing import Loaded, blank_pack

GPU = torch.device("cuda")


def numbered(number: int):
    blank = blank_pack(clip(0), SimpleNamespace(image=0), None, 1)
    return replace(blank, frames=Loaded(torch.full((1, 1, 4), float(number))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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


def test_workers_are_as_many_as_shared_memory_holds_and_too_little_is_told_in_one_line(data, tokens, monkeypatch):
    """A step of 3 clips has at most 3 x 14 frames of 3 x 64 x 64 bytes: one worker takes 4 times that."""
    steps = StepData(Split(data, "train"), tokens, PixelFrames(data / "frames-on-disk", 64), CONFIG)
    free = SimpleNamespace(f_frsize=1, f_bavail=12 * 42 * 12288)
    monkeypatch.setattr("trainer.loader.os.statvfs", lambda path: free)
    assert (_workers_that_fit(steps, 0, 1), _workers_that_fit(steps, 0, 8)) == (1, 2)
    free.f_bavail = 1_000_000
    with pytest.raises(InputError, match=r"up to 0 MB, so /dev/shm needs 2 MB but has 1 MB free; .*--workers 0"):
        _workers_that_fit(steps, 0, 1)
