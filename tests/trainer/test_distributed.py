"""Several ranks (processes over gloo) take the same step as one process on all of their clips."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from by_hand import NoisyFrames, clip_example
from small_run import CONFIG, clip, curve, go, weights

from pipeline.errors import InputError
from trainer.checkpoint import load_run
from trainer.config import TrainConfig
from trainer.distributed import World, join
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
    with join() as world:
        return {
            f"{name}, {'fsdp' if fsdp else 'ddp'}": one_step(world, owned, fsdp)
            for name, owned in CASES.items()
            for fsdp in (False, True)
        }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(2, all_steps, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_step_of_one_process(two_ranks, name, how):
    expected = one_step(World(), [[i for packs in CASES[name] for i in packs]])
    for rank in two_ranks:
        found = rank[f"{name}, {how}"]
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-5, abs=1e-5)
        for key, value in expected["step"].items():
            if key != "padding":
                assert found["step"][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    if name == "one rank without a positive, the other without a supervised frame":
        assert expected["step"]["n_speaking"] == 6


def bf16_step() -> dict:
    with join() as world:
        return one_step(world, [[0], [3]], fsdp=True, bf16=True)


@pytest.mark.slow
def test_sharded_layers_under_bf16_take_the_step_of_one_process(tmp_path):
    expected = one_step(World(), [[0, 3]], bf16=True)
    for found in on_ranks(2, bf16_step, tmp_path):
        assert found["step"]["loss"] == pytest.approx(expected["step"]["loss"], rel=1e-2)
        assert found["step"]["grad_norm"] == pytest.approx(expected["step"]["grad_norm"], rel=2e-2)
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-2, abs=1e-2)


def token_steps() -> list[dict]:
    with join() as world:
        return [one_step(world, CASES["a rank without a clip"], fsdp, arm="token") for fsdp in (False, True)]


@pytest.mark.slow
def test_two_ranks_that_decide_by_rows_of_the_lm_head_take_the_step_of_one_process(tmp_path):
    expected = one_step(World(), [[0, 1, 2]], arm="token")
    for found in (step for rank in on_ranks(2, token_steps, tmp_path) for step in rank):
        assert found["step"]["loss"] == pytest.approx(expected["step"]["loss"], rel=1e-5)
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-5, abs=1e-5)


def bad_loss_on_one_rank() -> str:
    with join() as world:
        model, packs, blank = model_and_packs()
        if world.rank == 1:
            packs[0].neg_rate.fill_(math.nan)
        config = TrainConfig(reweigh=True)
        try:
            train_step(world.copy(model), make_optimizer(model, config), [packs[1 - world.rank]], config, world, blank)
        except InputError as error:
            return str(error)
        return "no error"


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_clips(tmp_path):
    first, second = on_ranks(2, bad_loss_on_one_rank, tmp_path)
    assert first == second
    assert "the loss is not finite at clips" in first
    assert "train0" in first


def one_rank_fails(data: str, run: str) -> str:
    """Rank 1 loses its frames; rank 0 finds itself alone in a collective."""
    from trainer.config import RunOptions
    from trainer.frame_source import PixelFrames
    from trainer.train import train

    def fails(self, clip, start, end):
        raise InputError("the disk is gone")

    if os.environ["RANK"] == "1":
        PixelFrames.load = fails
    try:
        train(Path(data), Path(run), CONFIG, options=RunOptions(progress=False))
    except InputError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others_with_a_line(data, tmp_path):
    found = on_ranks(2, one_rank_fails, tmp_path / "out", str(data), str(tmp_path / "run"))
    assert found[1] == "the disk is gone"
    assert found[0].startswith("rank 0: ")
    assert "another rank stopped, and its message says why" in found[0]


# ---- a run -------------------------------------------------------------------------------------------


def run_it(data: str, run: str, resume: bool, steps_done: int, fsdp: bool = False) -> dict:
    import trainer.train
    from trainer.config import RunOptions

    if steps_done:  # dies there
        after = trainer.train._Session.after_step

        def dies(self, done, line):
            after(self, done, line)
            if done == steps_done:
                raise InputError("power cut")

        trainer.train._Session.after_step = dies
    options = RunOptions(save_every=2, fsdp=fsdp, progress=False)
    try:
        report = trainer.train.train(Path(data), Path(run), CONFIG, options=options, resume=resume)
    except InputError as error:
        return {"error": str(error)}
    return {"is_main": report.is_main, "loss": report.loss}


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
@pytest.mark.parametrize(("size", "fsdp"), [(2, False), (4, False), (2, True)])
def test_a_run_on_several_ranks_is_that_of_one(data, whole, tmp_path, size, fsdp):
    """4 ranks, 3 clips a step: one of them never has any."""
    found = on_ranks(size, run_it, tmp_path / "out", str(data), str(tmp_path / "run"), False, 0, fsdp)
    assert [f["is_main"] for f in found] == [True] + [False] * (size - 1)
    same_to_rounding(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_checkpoint_moves_between_world_sizes(data, whole, tmp_path):
    run = str(tmp_path / "run")
    found = on_ranks(2, run_it, tmp_path / "a", str(data), run, False, 5, True)  # sharded over two
    assert all("power cut" in f["error"] for f in found)
    go(data, tmp_path / "run", resume=True)  # alone
    same_to_rounding(tmp_path / "run", whole)
    assert set(weights(tmp_path / "run")) == set(weights(whole))
