"""Several ranks (processes over gloo) take the same step as one process on all of their clips."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from by_hand import NoisyFrames, clip_example
from small_run import clip, curve, go, go_until, weights

from pipeline.errors import InputError
from trainer.checkpoint import load_run
from trainer.config import TrainConfig
from trainer.distributed import World, join
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import blank_pack, make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import train_tiny_tokens
from trainer.train import make_optimizer, train_step

FRAMES = NoisyFrames()
STEP = TrainConfig(weight_decay=0.0, lr_by_part={"heads": 1e-2})


def _rank(rank: int, size: int, port: int, task, out: Path, args: tuple) -> None:
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
    mp.start_processes(_rank, (size, port, task, out, args), nprocs=size, start_method="forkserver")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


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
    return model, packs, blank_pack(chosen[0], tokens, FRAMES, 1)


STEPS = {  # packs of each rank, FSDP instead of DDP, what differs, how close
    "one rank without a positive, the other without a supervised frame": ([[1], [2]], False, {}, 1e-5),
    "fsdp, one rank without a positive, the other without a supervised frame": ([[1], [2]], True, {}, 1e-5),
    "fsdp, a rank without a clip": ([[0, 1, 2], []], True, {}, 1e-5),
    "a rank without a clip, deciding by rows of the lm_head": ([[0, 1, 2], []], False, {"arm": "token"}, 1e-5),
    "unequal numbers of packs": ([[2], [0, 1]], False, {}, 1e-5),
    "fsdp in bfloat16, unequal numbers of passes of the tower": ([[0], [3]], True, {"bf16": True}, 1e-2),
}


def one_step(world: World, owned: list[list[int]], fsdp: bool = False, **more) -> dict:
    """The step with packs `owned[rank]`: its numbers, and every weight afterwards, summed in chunks."""
    config = replace(STEP, **more)
    model, packs, blank = model_and_packs(config)
    wrapped = world.wrap(model, fsdp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_step(wrapped, optimizer, [packs[i] for i in owned[world.rank]], config, world, blank)
    after = torch.cat([getattr(p, "full_tensor", p.detach)().detach().flatten().double() for p in model.parameters()])
    return {"step": result.__dict__, "weights": [float(c.sum()) for c in after.split(5000)]}


def all_steps() -> dict:
    """And the error of a step whose loss is not finite on one rank."""
    with join() as world:
        steps = {name: one_step(world, owned, fsdp, **more) for name, (owned, fsdp, more, _) in STEPS.items()}
        config = TrainConfig(reweigh=True)
        model, packs, blank = model_and_packs(config)
        if world.rank == 1:
            packs[0].neg_rate.fill_(math.nan)
        try:
            wrapped = world.wrap(model, sharded=False)
            train_step(wrapped, make_optimizer(model, config), [packs[1 - world.rank]], config, world, blank)
        except InputError as error:
            return {**steps, "error": str(error)}
        return steps


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(2, all_steps, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_take_the_step_of_one_process(two_ranks, name):
    """TRAPS 17, 18."""
    owned, _, more, near = STEPS[name]
    expected = one_step(World(), [[i for packs in owned for i in packs]], **more)
    for found in (rank[name] for rank in two_ranks):
        assert found["weights"] == pytest.approx(expected["weights"], rel=near, abs=near)
        for key, value in expected["step"].items():
            if key != "padding":
                assert found["step"][key] == pytest.approx(value, rel=2 * near, abs=1e-7), key


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_clips(two_ranks):
    first, second = (rank["error"] for rank in two_ranks)
    assert first == second
    assert "the loss is not finite at clips" in first
    assert "train0" in first


# ---- a run -------------------------------------------------------------------------------------------


def run_that_dies(data: str, run: str) -> None:
    """All ranks die after step 5; the last checkpoint is of step 4."""
    go_until(5, Path(data), Path(run), fsdp=True)


@pytest.mark.slow
def test_a_run_on_four_ranks_that_share_the_model_is_that_of_one_which_can_resume_it(data, whole, tmp_path):
    """Of 3 clips a step: one of the ranks never has any."""
    run = tmp_path / "run"
    on_ranks(4, run_that_dies, tmp_path / "out", str(data), str(run))
    assert go(data, run, resume=True).resumed_from == 4
    assert set(weights(run)) == set(weights(whole))
    found, known = load_run(run).model.state_dict(), load_run(whole).model.state_dict()
    for name, value in known.items():
        assert torch.allclose(found[name], value, atol=2e-4), name
    for a, b in zip(curve(run), curve(whole), strict=True):
        assert a["step"] == b["step"]
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert (a["n_speaking"], a["n_dst_update"], a["n_lm"]) == (b["n_speaking"], b["n_dst_update"], b["n_lm"])
