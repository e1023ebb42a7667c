"""Trains a SmolVLM with two decision heads on preprocessed shards: `train` sets up and loops, `train_step` steps.

One optimizer step is `clips_per_step` clips over all ranks, cut into packs by memory alone; the loss is normalised over
the whole step, so neither the cut nor the number of ranks changes it. What step i reads is a pure function of i, so the
state of a run is its weights, the optimizer's moments and the number of steps done: on the CPU a resumed run ends with
the weights, bit for bit, of one that never stopped.

    RUN/options.json               what the run is a function of (trainer.checkpoint)
    RUN/metrics.jsonl, curves.svg  one line per step and evaluation; the picture of them
    RUN/last, RUN/best             checkpoints; best by mean AP on the evaluation split
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.dataset import Split
from pipeline.errors import InputError, NotFiniteError
from pipeline.schema import HEADS
from pipeline.storage import naming
from trainer.arms import find_arm
from trainer.checkpoint import (
    LoadedRun,
    check_folder,
    load_state,
    run_options,
    save_checkpoint,
    start_run,
    write_options,
)
from trainer.config import RunOptions, TrainConfig
from trainer.distributed import World, join, synced
from trainer.frame_source import FrameSource
from trainer.loader import StepData, Transfer, default_workers, step_packs, uploaded
from trainer.loss import Supervision, bce_sums, combine, lm_sum, supervise
from trainer.optimizer import make_optimizer
from trainer.packing import Pack, blank_pack, upload
from trainer.run_log import Log, find_tracker, open_log
from trainer.sequence import check_budget
from trainer.teacher_forced import open_source, report, score_split

ALONE = World()


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step over all ranks: loss, its unweighted terms, what each was averaged over, gradient norm."""

    loss: float
    speaking: float
    dst_update: float
    lm: float
    n_speaking: float
    n_dst_update: float
    n_lm: float
    grad_norm: float
    tokens: int  # that were read, of all ranks
    padding: float  # share of the tokens computed that were none of them


@dataclass
class TrainReport:
    steps: int
    resumed_from: int  # steps that were done before
    is_main: bool  # whether this process is the one to tell it
    note: str | None  # why there is no evaluation
    seconds: float = 0
    loss: float | None = None  # of the last step; None where all had been done before
    evaluation: dict[str, Any] | None = None


# ---- one step ----------------------------------------------------------------------------------------


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    packs: Sequence[Pack],
    config: TrainConfig,
    world: World = ALONE,
    blank: Pack | None = None,
) -> StepResult:
    """One optimizer step over all packs of all ranks together; collective.

    Ranks may hold different numbers of packs (then `blank` fills up). The host waits for a GPU once, for the numbers of
    the step. Raises NotFiniteError on every rank, before the optimizer moves anything, where a loss or the gradient is
    not finite.
    """
    fill_up = [blank] * (world.most(len(packs)) - len(packs))
    passes: list[Pack] = [*packs, *fill_up]  # type: ignore[list-item]  # on several ranks `blank` is there
    supervised = [supervise(pack.labels, pack.neg_rate, find_arm(config.arm), config.reweigh) for pack in passes]

    # what the sums are divided by is known before any forward pass: [7] for the 5 terms, tokens, tokens of blank packs
    heads = sum((of_pack.counts() for of_pack in supervised), torch.zeros(4))
    texts, tokens = sum(len(pack.lm_targets) for pack in packs), sum(pack.num_tokens for pack in packs)
    sizes = torch.tensor([texts, tokens, sum(pack.num_tokens for pack in passes) - tokens])
    whole_step = world.sum(upload(torch.cat([heads, sizes]), world.device))
    counts = whole_step[:5]

    optimizer.zero_grad(set_to_none=True)
    parts = []  # each pack's [5] sums
    for i, (pack, of_pack) in enumerate(zip(passes, supervised, strict=True), 1):
        with synced(model, now=i == len(passes)):
            sums = sum_terms(model, pack.to(world.device), of_pack.to(world.device))
            loss, _ = combine(sums, counts, config)
            (loss * world.size).backward()  # type: ignore[no-untyped-call]  # DDP and FSDP divide by it
        parts.append(sums.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    loss, terms = combine(world.sum(torch.stack(parts).sum(0)), counts, config)
    supervised_by = counts[0:2].sum(), counts[2:4].sum(), counts[4]
    numbers = torch.stack([loss, *terms.values(), *supervised_by, norm, *whole_step[5:]]).tolist()  # the wait
    if not (math.isfinite(numbers[0]) and math.isfinite(numbers[7])):
        what, bad = "gradient", list(packs)
        if not math.isfinite(numbers[0]):
            what, bad = "loss", [p for p, sums in zip(passes, parts, strict=True) if not torch.isfinite(sums).all()]
        by_rank = world.gather([clip_id for pack in bad for clip_id in pack.clip_ids])
        clips = ", ".join(dict.fromkeys(clip_id for of_rank in by_rank for clip_id in of_rank))
        hint = "look at them, or train anew with a lower --lr"
        raise NotFiniteError(f"the {what} is not finite at clips {clips}; {hint}")
    optimizer.step()
    *of_loss, read, blanks = numbers
    padding = blanks / max(read + blanks, 1)
    return StepResult(*of_loss, int(read), padding)  # type: ignore[call-arg]


def sum_terms(model: nn.Module, pack: Pack, supervised: Supervision) -> Tensor:
    """[5]: each term's sum over the pack, with its graph."""
    scores = model(pack)
    return torch.cat([bce_sums(scores.decisions, supervised), lm_sum(scores.text, pack.lm_targets)[None]])


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate in step 0, 1, ...: up in a line over the warm-up, then a half cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


# ---- a run -------------------------------------------------------------------------------------------


def train(
    data: Path,
    run: Path,
    config: TrainConfig,
    frames_root: Path | None = None,
    features: Path | None = None,
    options: RunOptions | None = None,
    resume: bool = False,
) -> TrainReport:
    """Train on the `train` split of `data` (written by preprocess) into the folder `run`; collective under torchrun.

    frames_root: where the videos' frames are; None: as the manifest says. features: what `encode` wrote, instead.
    resume: go on from RUN/last, or start where there is none yet; without it `run` must be new.
    Raises InputError for what the user can correct, before the first step where possible.
    """
    options = options or RunOptions()
    find_tracker(options.logger)
    if options.fsdp and (config.lora_rank or config.optimizer == "muon"):
        raise InputError("fsdp excludes lora_rank, whose copies are small, and muon, which needs whole matrices")
    with naming(run), join() as world, ExitStack() as stack:
        config = config.on(world.device.type)
        split, held_out, note = Split(data, "train"), None, None
        if config.eval_split in split.manifest["splits"]:
            held_out = Split(data, config.eval_split)
        else:
            there = ", ".join(sorted(split.manifest["splits"]))
            note = f"no split {config.eval_split!r} to evaluate on, found: {there}; preprocess one, or set --eval-split"
        splits = [split, *([held_out] if held_out else [])]
        started = run_options(config, split, held_out, features)
        if world.is_main:
            check_folder(run, started, resume, stack)  # and puts RUN/last in its place, which the others look for
        world.wait()
        state = start_run(run, split, config, resume)
        already = state.info["step"]
        if len(set(world.gather(already))) > 1:
            raise InputError("ranks disagree how far the run is; put --run on a disk that all of them see")
        if already < config.steps:
            clips = (clip for each in splits for clip in each.in_order(rate=None))
            longest = int(state.model.vlm.config.text_config.max_position_embeddings)
            check_budget(clips, state.tokens, config.tokens_per_frame, config.max_tokens, longest, state.model.arm)
        frames = open_source(splits, state.model, frames_root, features)

        model = world.wrap(state.model, options.fsdp)
        optimizer = make_optimizer(state.model, config)
        if already:
            load_state(run / "last", state.model, optimizer)
        if world.is_main:
            write_options(run, started, stack)
            sizes = ((p.nbytes, p.requires_grad) for p in state.model.parameters())
            needed = sum(size * (3 if learns else 1) for size, learns in sizes)  # RUN/last, with two moments
            if 0 < (free := shutil.disk_usage(run).free) < needed:  # 0: some buckets do not know
                raise InputError(f"{run}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB are needed; make room")
        note = f"all {already} steps had been done before" if already == config.steps else note
        done = TrainReport(config.steps, already, world.is_main, note)
        _Session(run, model, optimizer, state, options, frames, held_out, world, done).go(split)
        if world.is_main:
            from trainer.curves import draw  # matplotlib, which only this rank needs, once

            draw(run)
        return done


@dataclass
class _Session:
    """The steps of a run, and what it writes: the log as it comes, checkpoints and evaluations when they are due."""

    run: Path
    model: nn.Module  # `state.model`, or its wrapping by DDP
    optimizer: torch.optim.Optimizer
    state: LoadedRun
    options: RunOptions
    frames: FrameSource
    held_out: Split | None
    world: World
    report: TrainReport
    log: Log | None = None  # the main rank's

    def go(self, split: Split) -> None:
        """Do the steps that are left. Stopped by a loss that is not finite, it saves first."""
        began, transfer = time.monotonic(), Transfer(self.world.device)
        config, options, world, first = self.state.config, self.options, self.world, self.state.info["step"]
        data = StepData(split, self.state.tokens, self.frames, config, world.rank, world.size)
        workers = default_workers(world.device) if options.workers is None else options.workers
        blank = blank_pack(split.clip(0), self.state.tokens, self.frames, config.tokens_per_frame)
        self.model.train()
        with ExitStack() as stack:
            if world.is_main:
                log = open_log(self.run, config.steps, first, options.logger, options.progress, config.to_json())
                self.log = stack.enter_context(log)
            packs = stack.enter_context(closing(step_packs(data, first, workers, pin=transfer.overlaps)))
            try:
                before = time.monotonic()
                for step, of_step in enumerate(uploaded(packs, transfer), first):
                    share_of_peak = schedule(step, config)
                    for group in self.optimizer.param_groups:
                        group["lr"] = group["peak"] * share_of_peak
                    result = train_step(self.model, self.optimizer, of_step, config, world, blank)
                    numbers = {**result.__dict__, "lr": config.lr * share_of_peak, "seconds": time.monotonic() - before}
                    self.after_step(step + 1, {"step": step + 1, **numbers})
                    before = time.monotonic()
            except NotFiniteError:
                self.save("last")  # the optimizer has not moved: the weights are those of the last good step
                raise
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
                hint = "lower --micro-batch-tokens, or add --freeze vision or --checkpointing"
                raise InputError(f"step {self.state.info['step'] + 1}: {reason}; {hint}") from None
        self.report.seconds = time.monotonic() - began

    def after_step(self, step: int, line: dict[str, Any]) -> None:
        state, config = self.state, self.state.config
        state.info["step"], self.report.loss = step, line["loss"]
        if self.log is not None:
            self.log(line)
        last = step == config.steps
        if self.held_out is not None and (last or (config.eval_every and step % config.eval_every == 0)):
            sharded = self.options.fsdp
            scored = score_split(state, self.held_out, self.frames, self.world, sharded)
            self.report.evaluation = found = report(self.held_out.name, scored, state.model.arm)
            if self.log is not None:
                self.log({"step": step, "evaluation": found})
            known = [found[head]["ap"] for head in HEADS if found[head]["ap"] is not None]
            mean = self.world.gather(sum(known) / len(known) if known else -1.0)[0]  # rank 0's: all save, or none
            if mean > state.info["best"]:
                state.info["best"] = mean
                self.save("best")
        if last or (self.options.save_every and step % self.options.save_every == 0):
            self.save("last")

    def save(self, name: str) -> None:
        """RUN/last can go on, RUN/best can only score."""
        save_checkpoint(self.run / name, self.state, self.optimizer if name == "last" else None, self.world)
