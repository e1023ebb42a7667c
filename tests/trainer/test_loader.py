"""Packs come ahead of their use: from workers within shared memory, and onto a GPU."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from pipeline.errors import InputError
from trainer import loader
from trainer.loader import InFlight
from trainer.packing import blank_pack
from trainer.transfer import Transfer, uploaded

GPU = torch.device("cuda")
PROCESSES = multiprocessing.get_context("forkserver")


def numbered(number: int):
    return blank_pack(number, torch.full((1, 1, 4), float(number)), 1)


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


def test_workers_wait_until_what_they_load_fits_and_the_step_that_is_due_does_not():
    flight = InFlight(PROCESSES, first=5, limit=100)
    flight.wait(6, 60)
    flight.wait(5, 70)  # due: over the limit, or training would wait for ever
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (flight.wait(7, 50), done.set()), daemon=True)
    waiting.start()
    flight.used(5, 70)  # 60 are left, and 50 more are too many
    assert not done.wait(0.05)
    flight.used(6, 60)
    assert done.wait(10)


def test_a_step_that_shared_memory_cannot_hold_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 64_000_000)
    with pytest.raises(InputError, match=r"step 1: its frames take 7,500 MB, /dev/shm has 64 MB free; .*--workers 0"):
        InFlight(PROCESSES, 0, 32_000_000).wait(0, 7_500_000_000)
