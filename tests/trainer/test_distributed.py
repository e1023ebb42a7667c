"""Several ranks (processes over gloo) take the same step as one process on all of their clips."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from by_hand import NoisyFrames, clip_example
from small_run import clip, curve, go, weights

import trainer.train
from pipeline.errors import InputError
from trainer.checkpoint import load_run
from trainer.config import TrainConfig
from trainer.distributed import World, join
from trainer.frame_source import PixelFrames
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import train_tiny_tokens
from trainer.train import make_optimizer, train_step

FRAMES = NoisyFrames()
STEP = TrainConfig(weight_decay=0.0, lr_by_part={"heads": 1e-2})


def _rank(rank: int, size: int, port: int, task, out: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    result = task(*args)
    (out / f"{rank}.json").write_text(json.dumps(result))


def on_ranks(size: int, task, out: Path, *args) -> list:
    """What `task(*args)` returned on each rank."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["trainer.train"])  # torch is imported once
    mp.start_processes(_rank, (size, port, task, out, args), nprocs=size, start_method="forkserver")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


# ---- who does what -----------------------------------------------------------------------------------


def test_one_process_is_a_world_of_its_own():
    with join() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.most(3) == 3
        assert world.gather("x") == ["x"]
        assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))


# ---- one step ----------------------------------------------------------------------------------------


def model_and_packs(config: TrainConfig = STEP):
    """A tiny model and one pack per clip: with events, without a positive, without any supervised frame or text."""
    tokens = train_tiny_tokens(["What now?", "Well done.", "S1->complete"] * 3)
    heads = DecisionHeads(128, (0.2, 0.1))
    torch.manual_seed(1)
    torch.nn.init.normal_(heads.speak.weight, std=0.1)
    model = ProspectModel(load_model("tiny", len(tokens)), heads, config, tokens.choices)
    chosen = [
        clip(0, rate=0.5),
        clip_example([], 0, 6, clip_id="no-positive", rate=1.0),
        clip_example([], 0, 6, clip_id="nothing", rate=0.0),
        clip_example([], 0, 70, clip_id="long", rate=0.2),  # two passes of the tower
    ]
    assert (chosen[2].labels == -100).all()
    packs = [make_pack(build_windows(c, tokens, 1, 200), FRAMES) for c in chosen]
    return model, packs, model.blank_pack(tokens.image, cached=False)


CASES = {
    "one rank without a positive, the other without a supervised frame": [[1], [2]],
    "a rank without a clip": [[0, 1, 2], []],
    "unequal numbers of packs": [[2], [0, 1]],
    "unequal numbers of passes of the tower": [[0], [3]],
}
MORE = {  # what differs, how close
    "ddp": ({}, 1e-5),
    "fsdp": ({}, 1e-5),
    "fsdp in bfloat16": ({"bf16": True}, 1e-2),
    "ddp that decides by rows of the lm_head": ({"arm": "token"}, 1e-5),
}
STEPS = [(name, how) for name in CASES for how in ("ddp", "fsdp")] + [
    ("unequal numbers of passes of the tower", "fsdp in bfloat16"),
    ("a rank without a clip", "ddp that decides by rows of the lm_head"),
]


def one_step(world: World, owned: list[list[int]], fsdp: bool = False, **more) -> dict:
    """The step with packs `owned[rank]`: its numbers, and every weight afterwards, summed in chunks."""
    config = replace(STEP, **more)
    model, packs, blank = model_and_packs(config)
    wrapped = world.shard(model) if fsdp else world.copy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_step(wrapped, optimizer, [packs[i] for i in owned[world.rank]], config, world, blank)
    after = torch.cat([getattr(p, "full_tensor", p.detach)().detach().flatten().double() for p in model.parameters()])
    return {"step": result.__dict__, "weights": [float(c.sum()) for c in after.split(5000)]}


def all_steps() -> dict:
    """And the error of a step whose loss is not finite on one rank."""
    with join() as world:
        steps = {f"{name}, {how}": one_step(world, CASES[name], "fsdp" in how, **MORE[how][0]) for name, how in STEPS}
        config = TrainConfig(reweigh=True)
        model, packs, blank = model_and_packs(config)
        if world.rank == 1:
            packs[0].neg_rate.fill_(math.nan)
        try:
            train_step(world.copy(model), make_optimizer(model, config), [packs[1 - world.rank]], config, world, blank)
        except InputError as error:
            return {**steps, "error": str(error)}
        return steps


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(2, all_steps, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize(("name", "how"), STEPS)
def test_two_ranks_take_the_step_of_one_process(two_ranks, name, how):
    more, near = MORE[how]
    expected = one_step(World(), [[i for packs in CASES[name] for i in packs]], **more)
    for rank in two_ranks:
        found = rank[f"{name}, {how}"]
        assert found["weights"] == pytest.approx(expected["weights"], rel=near, abs=near)
        for key, value in expected["step"].items():
            if key != "padding":
                assert found["step"][key] == pytest.approx(value, rel=2 * near, abs=1e-7), key
    if name == "one rank without a positive, the other without a supervised frame":
        assert expected["step"]["n_speaking"] == 6


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_clips(two_ranks):
    first, second = (rank["error"] for rank in two_ranks)
    assert first == second
    assert "the loss is not finite at clips" in first
    assert "train0" in first


# ---- a run -------------------------------------------------------------------------------------------


def run_it(data: str, run: str, dies_after: int = 0, fails: bool = False, **more) -> dict:
    """A run that is all done, or dies after some steps on all ranks, or whose rank 1 `fails` as it loses its frames."""
    after = trainer.train._Session.after_step

    def dies(self, done, line):
        after(self, done, line)
        if done == dies_after:
            raise InputError("power cut")

    def lost(self, clip, start, end):
        raise InputError("the disk is gone")

    trainer.train._Session.after_step = dies
    if fails and os.environ["RANK"] == "1":
        PixelFrames.load = lost
    try:
        return {"is_main": go(Path(data), Path(run), **more).is_main}
    except InputError as error:
        return {"error": str(error)}


def same_to_rounding(run: Path, expected: Path) -> None:
    found, known = load_run(run).model.state_dict(), load_run(expected).model.state_dict()
    for name, value in known.items():
        assert torch.allclose(found[name], value, atol=2e-4), name
    for a, b in zip(curve(run), curve(expected), strict=True):
        assert a["step"] == b["step"]
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert (a["n_speaking"], a["n_dst_update"], a["n_lm"]) == (b["n_speaking"], b["n_dst_update"], b["n_lm"])


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others_with_a_line(data, tmp_path):
    """Rank 1 loses its frames; rank 0 finds itself alone in a collective."""
    found = on_ranks(2, partial(run_it, fails=True), tmp_path / "out", str(data), str(tmp_path / "run"))
    assert found[1]["error"] == "the disk is gone"
    assert found[0]["error"].startswith("rank 0: ")
    assert "another rank stopped, and its message says why" in found[0]["error"]


@pytest.mark.slow
def test_a_run_on_four_ranks_is_that_of_one(data, whole, tmp_path):
    """Of 3 clips a step: one of the ranks never has any."""
    found = on_ranks(4, run_it, tmp_path / "out", str(data), str(tmp_path / "run"))
    assert [f["is_main"] for f in found] == [True, False, False, False]
    same_to_rounding(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_checkpoint_moves_from_two_ranks_that_share_the_model_to_one(data, whole, tmp_path):
    run, dies = tmp_path / "run", partial(run_it, dies_after=5, fsdp=True)
    assert all("power cut" in f["error"] for f in on_ranks(2, dies, tmp_path / "a", str(data), str(run)))
    go(data, run, resume=True)  # alone
    same_to_rounding(run, whole)
    assert set(weights(run)) == set(weights(whole))
