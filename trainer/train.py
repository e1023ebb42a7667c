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
import sys
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
from pipeline.storage import check_space, naming
from trainer import vision
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
from trainer.loader import StepData, default_workers, step_packs
from trainer.loss import Supervision, bce_sums, combine, lm_sum, supervise
from trainer.model import ProspectModel
from trainer.optimizer import make_optimizer
from trainer.packing import Pack, upload
from trainer.run_log import Log, find_tracker, open_log
from trainer.sequence import check_budget
from trainer.teacher_forced import EvalReport, open_source, report, score_split
from trainer.transfer import Transfer, uploaded

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


@dataclass(frozen=True)
class TrainReport:
    run: Path
    steps: int
    resumed_from: int  # steps that were done before
    seconds: float
    loss: float | None  # of the last step; None where all had been done before
    evaluation: EvalReport | None
    note: str | None  # why there is no evaluation
    is_main: bool = True  # whether this process is the one to tell it


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
    if options.fsdp and config.lora_rank:
        raise InputError("fsdp and lora_rank exclude each other: adapters alone are small, copies fit; drop --fsdp")
    if options.fsdp and config.optimizer == "muon":
        raise InputError("fsdp and optimizer muon exclude each other: muon needs whole matrices; use --optimizer adamw")
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

        sharded = options.fsdp and world.size > 1
        model = world.shard(state.model) if sharded else state.model.to(world.device)
        optimizer = make_optimizer(state.model, config)
        if already:
            load_state(run / "last", state.model, optimizer)
        model = model if sharded else world.copy(model)
        if world.is_main:
            write_options(run, started, stack)
            sizes = ((p.nbytes, p.requires_grad) for p in state.model.parameters())
            check_space(run, sum(size * (3 if learns else 1) for size, learns in sizes))  # RUN/last, with two moments
        session = _Session(run, model, optimizer, state, options, frames, held_out, world)
        seconds = session.go(split, cached=features is not None)
        if world.is_main:
            from trainer.curves import draw  # matplotlib, which only this rank needs, once

            draw(run)
        note = f"all {already} steps had been done before" if already == config.steps else note
        return TrainReport(run, config.steps, already, seconds, session.loss, session.evaluation, note, world.is_main)


def memory_line(model: ProspectModel, frames: int, room: int, ranks: int = 1) -> str:
    """What training a tower from pixels takes, where a pack has up to `frames`; InputError where `room` has less.

    A lower bound, in bytes: weights, gradients and AdamW's moments in float32, shared by `ranks`; what the tower keeps
    of each frame (`vision.bytes_to_learn`). What the text body keeps of each token comes on top.
    """
    each = vision.bytes_to_learn(model.vlm, model.bf16)
    held = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) // ranks
    line = (
        f"the vision tower learns from pixels: {each / 1e6:,.0f} MB a frame, {frames} frames in a pack, "
        f"{held / 1e9:.1f} GB of weights and optimizer: at least {(frames * each + held) / 1e9:,.1f} GB of the GPU's "
        f"{room / 1e9:,.1f} GB"
    )
    if frames * each + held > room:
        raise InputError(f"{line}; add --freeze vision or --checkpointing, or lower --micro-batch-tokens")
    return line


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
    log: Log | None = None  # the main rank's
    loss: float | None = None
    evaluation: EvalReport | None = None

    def go(self, split: Split, cached: bool) -> float:
        """Do the steps that are left; the seconds they took. Stopped by a loss that is not finite, it saves first."""
        began, transfer = time.monotonic(), Transfer(self.world.device)
        config, options, world, first = self.state.config, self.options, self.world, self.state.info["step"]
        data = StepData(split, self.state.tokens, self.frames, config, world.rank, world.size)
        if not (cached or "vision" in config.freeze or config.checkpointing or first == config.steps):
            self._check_memory(data[first])
        workers = default_workers(world.device) if options.workers is None else options.workers
        blank = self.state.model.blank_pack(self.state.tokens.image, cached)
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
                    seconds = time.monotonic() - before
                    lr = config.lr * share_of_peak
                    self.after_step(step + 1, {"step": step + 1, **result.__dict__, "lr": lr, "seconds": seconds})
                    before = time.monotonic()
            except NotFiniteError:
                self.save("last")  # the optimizer has not moved: the weights are those of the last good step
                raise
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
                hint = "lower --micro-batch-tokens, or add --checkpointing"
                raise InputError(f"step {self.state.info['step'] + 1}: {reason}; {hint}") from None
        return time.monotonic() - began

    def _check_memory(self, packs: Sequence[Pack]) -> None:
        """Say what a tower that learns from pixels takes; InputError, on every rank, where a GPU has not as much."""
        seen = self.state.model.arm.images  # else a pass runs the tower on one grey frame
        frames = self.world.most(max((pack.labels.shape[1] if seen else 1 for pack in packs), default=0))
        if self.world.device.type == "cuda":
            room = torch.cuda.get_device_properties(self.world.device).total_memory
            line = memory_line(self.state.model, frames, room, self.world.size if self.options.fsdp else 1)
            if self.options.progress and self.world.is_main:
                print(line, file=sys.stderr)

    def after_step(self, step: int, line: dict[str, Any]) -> None:
        self.state.info["step"], self.loss = step, line["loss"]
        if self.log is not None:
            self.log(line)
        every, last = self.state.config.eval_every, step == self.state.config.steps
        if self.held_out is not None and (last or (every and step % every == 0)):
            self._evaluate(self.held_out, step)
        if last or (self.options.save_every and step % self.options.save_every == 0):
            self.save("last")

    def _evaluate(self, split: Split, step: int) -> None:
        state = self.state
        model, tokens = state.model, state.tokens
        scored = score_split(model, tokens, split, self.frames, state.config, self.world, self.options.fsdp)
        self.evaluation = report(split.name, scored, model.arm)
        if self.log is not None:
            self.log({"step": step, "evaluation": self.evaluation.to_json()})
        known = [head.ap for head in (self.evaluation.speaking, self.evaluation.dst_update) if head.ap is not None]
        mean = self.world.gather(sum(known) / len(known) if known else -1.0)[0]  # rank 0's: all save, or none
        if mean > state.info["best"]:
            state.info["best"] = mean
            self.save("best")

    def save(self, name: str) -> None:
        """RUN/last can go on, RUN/best can only score."""
        save_checkpoint(self.run / name, self.state, self.optimizer if name == "last" else None, self.world)
