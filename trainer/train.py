"""Trains a SmolVLM with two decision heads on preprocessed shards: `train` sets up and loops, `train_step` steps.

One optimizer step is `clips_per_step` clips over all ranks, cut into packs by memory alone; the loss is normalised over
the whole step, so neither the cut nor the number of ranks changes it. What step i reads is a pure function of i: on the
CPU a resumed run ends with the weights, bit for bit, of one that never stopped.

    RUN/options.json               what the run is a function of (trainer.checkpoint)
    RUN/metrics.jsonl, curves.svg  one line per step and evaluation; the picture of them
    RUN/last, RUN/best             checkpoints; best by mean AP on the evaluation split
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.dataset import Split
from pipeline.errors import InputError, NotFiniteError
from pipeline.schema import HEADS
from pipeline.storage import naming
from trainer import checkpoint
from trainer.arms import find_arm
from trainer.checkpoint import LoadedRun
from trainer.config import RunOptions, TrainConfig
from trainer.distributed import World, join, synced
from trainer.frame_source import FrameSource
from trainer.loader import StepData, Transfer, default_workers, step_packs, uploaded
from trainer.loss import Supervision, bce_sums, combine, lm_sum, supervise
from trainer.model import ProspectModel, part_of
from trainer.packing import Pack, blank_pack, upload
from trainer.run_log import Log, find_tracker, open_log
from trainer.sequence import check_budget
from trainer.teacher_forced import open_source, report, score_split

ALONE = World()
MOMENTUM = 0.95
MATRIX_LR = 5.0  # times the others' learning rate
_RMS = 0.2  # of an update, as AdamW's are (Liu et al. 2025, "Muon is scalable for LLM training")
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: five rounds bring singular values to 0.7 .. 1.2


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
    """One optimizer step over all packs of all ranks together; collective. `blank` fills up where a rank has fewer.

    The host waits for a GPU once, for the numbers of the step. Raises NotFiniteError on every rank, before the
    optimizer moves anything, where a loss or the gradient is not finite.
    """
    fill_up = [blank] * (world.most(len(packs)) - len(packs))
    passes: list[Pack] = [*packs, *fill_up]  # type: ignore[list-item]  # on several ranks `blank` is there
    supervised = [supervise(pack.labels, pack.neg_rate, find_arm(config.arm), config.reweigh) for pack in passes]

    # what the sums are divided by is known before any forward pass: [7] for the 5 terms, tokens, tokens of blank packs
    heads = sum((of_pack.counts() for of_pack in supervised), torch.zeros(4))
    texts, tokens = sum(len(pack.lm_targets) for pack in packs), sum(len(pack.input_ids) for pack in packs)
    sizes = torch.tensor([texts, tokens, sum(len(pack.input_ids) for pack in passes) - tokens])
    whole_step = world.sum(upload(torch.cat([heads, sizes]), world.device))
    counts = whole_step[:5]

    optimizer.zero_grad(set_to_none=True)
    parts = []  # each pack's [5] sums
    for i, (pack, of_pack) in enumerate(zip(passes, supervised, strict=True), 1):
        with synced(model, now=i == len(passes)):
            sums = sum_terms(model, pack.to(world.device), of_pack)
            loss, _ = combine(sums, counts, config)
            (loss * world.size).backward()  # type: ignore[no-untyped-call]  # DDP and FSDP divide by it
        parts.append(sums.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    loss, terms = combine(world.sum(torch.stack(parts).sum(0)), counts, config)
    supervised_by = counts[0:2].sum(), counts[2:4].sum(), counts[4]
    numbers = torch.stack([loss, *terms.values(), *supervised_by, norm, *whole_step[5:]]).tolist()  # the wait
    if not (math.isfinite(numbers[0]) and math.isfinite(numbers[7])):
        quantity = "gradient" if math.isfinite(numbers[0]) else "loss"
        seen = zip(passes, parts, strict=True)
        bad = [pack.clip_ids for pack, sums in seen if quantity == "gradient" or not torch.isfinite(sums).all()]
        clips = ", ".join(dict.fromkeys(clip_id for of_rank in world.gather(bad) for ids in of_rank for clip_id in ids))
        raise NotFiniteError(f"the {quantity} is not finite at clips {clips}; look at them, or train with a lower --lr")
    optimizer.step()
    *of_loss, read, blanks = numbers
    return StepResult(*of_loss, int(read), blanks / max(read + blanks, 1))  # type: ignore[call-arg]


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
        raise InputError("fsdp excludes lora_rank (copies are small) and muon (needs whole matrices); drop one of them")
    with naming(run), join() as world, ExitStack() as stack:
        config = config.on(world.device.type)
        split = Split(data, "train")
        held_out = Split(data, config.eval_split) if config.eval_split in split.manifest["splits"] else None
        splits = [split, held_out] if held_out else [split]
        started = checkpoint.run_options(config, split, held_out, features)
        if world.is_main:
            checkpoint.check_folder(run, started, resume, stack)  # and moves RUN/last, which the others look for
            if resume and options.progress and not (run / "last").exists():
                print(f"{run}: nothing to resume there; this is a new run", file=sys.stderr)
        world.gather(None)
        state = checkpoint.start_run(run, split, config, resume)
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
            checkpoint.load_state(run / "last", state.model, optimizer)
        if world.is_main:
            checkpoint.write_options(run, started, state.model, stack)
        note = None
        if already == config.steps:
            note = f"all {already} steps had been done before"
        elif held_out is None:
            available = ", ".join(sorted(split.manifest["splits"]))
            note = f"no split {config.eval_split!r} to evaluate on, found: {available}"
            note += "; preprocess one, or set --eval-split"
        done = TrainReport(config.steps, already, world.is_main, note)
        _Session(run, model, optimizer, state, options, frames, held_out, world, done).go(split)
        if world.is_main:
            from trainer.curves import draw  # matplotlib, which only this rank needs, once

            draw(run)
        return done


def bytes_to_learn(model: ProspectModel) -> int:
    """What the vision tower keeps of one frame for the backward pass without checkpointing: 378 MB at 256M in bf16.

    Per layer and patch, of the hidden width: both norms' inputs in float32, queries, keys, values, attention's output,
    and autocast's copies of inputs; of the MLP's width: its activation's input and output.
    """
    tower = model.vlm.config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    hidden, inner = (24, 4) if model.bf16 else (32, 8)  # bytes
    return int(tower.num_hidden_layers * patches * (hidden * tower.hidden_size + inner * tower.intermediate_size))


def memory_line(model: ProspectModel, frames: int, room: int, ranks: int = 1) -> str:
    """What it takes to train the tower from pixels on a GPU of `room` bytes; InputError where that is too little.

    A lower bound for packs of up to `frames`: weights, gradients and AdamW's moments in float32, shared by `ranks`, and
    what the tower keeps of each frame. What the text body keeps of each token comes on top.
    """
    each = bytes_to_learn(model)
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
    report: TrainReport
    log: Log | None = None  # the main rank's

    def go(self, split: Split) -> None:
        """Do the steps that are left. Stopped by a loss that is not finite, it saves first."""
        began, transfer = time.monotonic(), Transfer(self.world.device)
        config, options, world, first = self.state.config, self.options, self.world, self.state.info["step"]
        data = StepData(split, self.state.tokens, self.frames, config, world.rank, world.size)
        workers = default_workers(world.device) if options.workers is None else options.workers
        blank = blank_pack(split.clip(0), self.state.tokens, self.frames, config.tokens_per_frame)
        self.check_memory(data, first, blank)
        self.model.train()
        with ExitStack() as stack:
            if world.is_main:
                log = open_log(self.run, config.steps, first, options.logger, options.progress, asdict(config))
                self.log = stack.enter_context(log)
            asked = options.workers is not None
            packs = stack.enter_context(closing(step_packs(data, first, workers, transfer.overlaps, asked)))
            try:
                before = time.monotonic()
                for step, of_step in enumerate(uploaded(packs, transfer), first):
                    share_of_peak = schedule(step, config)
                    for group in self.optimizer.param_groups:
                        group["lr"] = group["peak"] * share_of_peak
                    try:
                        result = train_step(self.model, self.optimizer, of_step, config, world, blank)
                    except NotFiniteError:
                        self.save("last")  # the optimizer has not moved: the weights are those of the last good step
                        raise
                    numbers = {**result.__dict__, "lr": config.lr * share_of_peak, "seconds": time.monotonic() - before}
                    self.after_step(step + 1, {"step": step + 1, **numbers})
                    before = time.monotonic()
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
                hint = "lower --micro-batch-tokens, or add --freeze vision or --checkpointing"
                raise InputError(f"step {self.state.info['step'] + 1}: {reason}; {hint}") from None
        self.report.seconds = time.monotonic() - began

    def check_memory(self, data: StepData, first: int, blank: Pack) -> None:
        """Say what a tower that learns from pixels takes; InputError, on every rank, where a GPU has not as much."""
        world, config = self.world, self.state.config
        learns = self.state.model.arm.images and not (config.checkpointing or "vision" in config.freeze)
        if not learns or world.device.type != "cuda" or first >= config.steps or blank.frames().dtype != torch.uint8:
            return
        frames = world.most(max((pack.labels.shape[1] for pack in data[first]), default=0))
        room = torch.cuda.get_device_properties(world.device).total_memory
        line = memory_line(self.state.model, frames, room, world.size if self.options.fsdp else 1)
        if self.options.progress and world.is_main:
            print(line, file=sys.stderr)

    def after_step(self, step: int, line: dict[str, Any]) -> None:
        state, config = self.state, self.state.config
        state.info["step"], self.report.loss = step, line["loss"]
        if self.log is not None:
            self.log(line)
        last = step == config.steps
        if self.held_out is not None and (last or (config.eval_every and step % config.eval_every == 0)):
            sharded = self.options.fsdp
            scored = score_split(state, self.held_out, self.frames, self.world, sharded)
            self.report.evaluation = evaluation = report(self.held_out.name, scored, state.model.arm)
            if self.log is not None:
                self.log({"step": step, "evaluation": evaluation})
            known = [evaluation[head]["ap"] for head in HEADS if evaluation[head]["ap"] is not None]
            mean = self.world.gather(sum(known) / len(known) if known else -1.0)[0]  # rank 0's: all save, or none
            if mean > state.info["best"]:
                state.info["best"] = mean
                self.save("best")
        if last or (self.options.save_every and step % self.options.save_every == 0):
            self.save("last")

    def save(self, name: str) -> None:
        """RUN/last can go on, RUN/best can only score."""
        checkpoint.save_checkpoint(self.run / name, self.state, self.optimizer if name == "last" else None, self.world)


# ---- the optimizer -----------------------------------------------------------------------------------


def make_optimizer(model: ProspectModel, config: TrainConfig) -> torch.optim.AdamW:
    """A group per part and kind, each with its peak rate (`peak`); no decay on biases and norms."""
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, decay = part_of(name), config.weight_decay if parameter.ndim >= 2 else 0.0
            hidden = parameter.ndim == 2 and part != "heads" and "embed" not in name and "lm_head" not in name
            muon = hidden and config.optimizer == "muon"
            peak = config.lr_by_part.get(part, config.lr) * (MATRIX_LR if muon else 1.0)
            group = {"params": [], "weight_decay": decay, "peak": peak, "muon": muon}
            groups.setdefault((part, parameter.ndim >= 2, muon), group)["params"].append(parameter)
    kind = MuonAdamW if config.optimizer == "muon" else torch.optim.AdamW
    return kind(list(groups.values()), lr=config.lr, betas=config.betas, fused=True)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for groups with `muon`; its momentum is kept as `exp_avg`, as AdamW's is.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon): all singular values of a momentum become about 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step(closure)
        self.param_groups = groups
        by_shape: dict[tuple[int, torch.Size], list[Tensor]] = {}
        for i, group in enumerate(groups):
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    by_shape.setdefault((i, parameter.shape), []).append(parameter)
        for (i, shape), parameters in by_shape.items():
            group = groups[i]
            for new in (parameter for parameter in parameters if not self.state[parameter]):  # AdamW looks for a step
                self.state[new] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(new)}
            momentum = [self.state[parameter]["exp_avg"] for parameter in parameters]
            gradients: list[Any] = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momentum, MOMENTUM))  # Nesterov's
            updates = orthogonalised(ahead) * (group["lr"] * _RMS * math.sqrt(max(shape)))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, list(updates.unbind()))


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, rows, columns] with all singular values near 1, singular vectors kept."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
