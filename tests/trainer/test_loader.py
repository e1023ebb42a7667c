"""Packs come ahead of their use: from workers within shared memory, and onto the device before they are asked for."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from small_run import curve, go, write_data

from pipeline.errors import InputError
from trainer import loader
from trainer.loader import InFlight
from trainer.packing import blank_pack
from trainer.transfer import Transfer, uploaded

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROCESSES = multiprocessing.get_context("forkserver")


def numbered(number: int):
    return blank_pack(number, torch.full((1, 1, 4), float(number)), 1)


# ---- onto the device ---------------------------------------------------------------------------------


class LoggedTransfer(Transfer):
    """A CPU's copies that say when they were started and taken, and pretend to overlap."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.overlaps, self.log = True, []

    def up(self, values):
        number, take = int(values[0].flatten()[0]), super().up(values)
        self.log.append(f"start {number}")
        return lambda: self.log.append(f"take {number}") or take()


def test_a_pack_is_on_its_way_while_the_one_before_it_is_computed():
    transfer, used = LoggedTransfer(), []

    def made():
        for step in ([1, 2], [3], [], [4]):
            transfer.log.append(f"fetch {step}")
            yield [numbered(number) for number in step]

    for step in uploaded(made(), transfer):
        for pack in step:
            there = pack.to(CPU)
            transfer.log.append(f"compute {int(there.input_ids[0])}")
            used.append(int(there.frames().flatten()[0]))
    assert used == [1, 2, 3, 4]
    assert transfer.log == [
        *("fetch [1, 2]", "fetch [3]", "start 1", "take 1", "start 2", "compute 1"),
        *("take 2", "start 3", "compute 2", "fetch []", "take 3", "compute 3"),
        *("fetch [4]", "start 4", "take 4", "compute 4"),
    ]


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


# ---- workers -----------------------------------------------------------------------------------------


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


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_learns_the_same_from_workers_and_from_its_own_process(tmp_path):
    data = write_data(tmp_path / "data")
    for workers in (0, 2):
        go(data, tmp_path / f"run{workers}", workers=workers)
    own, theirs = ([line["loss"] for line in curve(tmp_path / f"run{n}") if "loss" in line] for n in (0, 2))
    assert theirs == pytest.approx(own, rel=1e-2)
