"""Trains a SmolVLM with two decision heads on preprocessed shards: `train` sets up, `fit` loops,
`train_step` steps.

Teacher-forced: texts in the context are the reference's. One optimizer step is `clips_per_step` clips,
cut into micro-batches by memory alone; the loss is normalised over the whole step, so the cut changes
nothing. Same seed, data and machine: the same weights, bit for bit (on the CPU; not tried on a GPU).

    RUN/metrics.jsonl   one line per step (and per evaluation)
    RUN/last, RUN/best  checkpoints; best by mean AP on the evaluation split

    5 loss terms (losses.TERMS)
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from trainer.batch import Batch, micro_batches, windows_of
from trainer.checkpoint import save_checkpoint
from trainer.clips import ClipExample
from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.evaluate import EvalReport, report, score_clips
from trainer.frames import FrameSource, open_frames
from trainer.losses import combine, label_weights, lm_sum, masked_bce_sum
from trainer.model import DecisionHeads, ProspectModel, load_model, pick_device
from trainer.shards import Split
from trainer.tokenizer import Tokens, load_tokens, train_tiny_tokens

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: loss, its unweighted terms, what each was averaged over, gradient norm."""

    loss: float
    speak: float
    dst: float
    lm: float
    n_speak: float
    n_dst: float
    n_lm: float
    grad_norm: float


@dataclass(frozen=True)
class TrainReport:
    run: Path
    steps: int
    seconds: float
    loss: float  # of the last step
    evaluation: EvalReport | None
    note: str | None  # why there is no evaluation


# ---- one step ----------------------------------------------------------------------------------------


def train_step(
    model: ProspectModel, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], config: TrainConfig
) -> StepResult:
    """One optimizer step over all micro-batches together.

    Raises TrainerError, before the optimizer moves anything, where a loss or the gradient is not finite.
    """
    counts = torch.stack([count_terms(batch, config) for batch in batches]).sum(0)
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros_like(counts)
    for batch in batches:
        part = sum_terms(model, batch, config)
        loss, _ = combine(part, counts, config)
        if not torch.isfinite(loss):
            raise _not_finite("loss", [batch])
        loss.backward()  # type: ignore[no-untyped-call]
        sums += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    if not torch.isfinite(norm):
        raise _not_finite("gradient", batches)
    optimizer.step()
    loss, terms = combine(sums, counts, config)
    n_speak, n_dst, n_lm = float(counts[0:2].sum()), float(counts[2:4].sum()), float(counts[4])
    values = {name: float(value) for name, value in terms.items()}
    return StepResult(float(loss), **values, n_speak=n_speak, n_dst=n_dst, n_lm=n_lm, grad_norm=float(norm))


def count_terms(batch: Batch, config: TrainConfig) -> Tensor:
    """[5]: what each term's sum will be divided by, known before any forward pass."""
    weights = label_weights(batch.labels, batch.neg_rate, config.reweigh)
    _, heads = masked_bce_sum(torch.zeros_like(weights), batch.labels, weights)
    return torch.cat([heads, heads.new_tensor([len(batch.lm_targets)])])


def sum_terms(model: ProspectModel, batch: Batch, config: TrainConfig) -> Tensor:
    """[5]: each term's sum over the batch, with its graph."""
    scores = model(batch)
    weights = label_weights(batch.labels, batch.neg_rate, config.reweigh)
    heads, _ = masked_bce_sum(scores.decisions.float(), batch.labels, weights)
    return torch.cat([heads, lm_sum(scores.text, batch.lm_targets)[None]])


def _not_finite(what: str, batches: Sequence[Batch]) -> TrainerError:
    clips = dict.fromkeys(window.clip.clip_id for batch in batches for window in batch.windows)
    return TrainerError(f"the {what} is not finite at clips {', '.join(clips)}; lower --lr, or look at these clips")


# ---- the loop ----------------------------------------------------------------------------------------


def make_optimizer(model: ProspectModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, no decay on biases and norms."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: up in a line over the warm-up, then down a half cosine to 0 after the last."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def clip_stream(split: Split, seed: int, epoch: int = 0, position: int = 0) -> Iterator[ClipExample]:
    """Clips without end: the rest of `epoch`, then the epochs after it, each with its order and labels."""
    for number in itertools.count(epoch):
        yield from split.epoch(seed, number, position)
        position = 0


def step_batches(
    clips: Iterator[ClipExample], tokens: Tokens, frames: FrameSource, config: TrainConfig
) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step after the other."""
    while True:
        chosen = list(itertools.islice(clips, config.clips_per_step))
        yield micro_batches(windows_of(chosen, tokens, config), frames, config.micro_batch_tokens)


def fit(
    model: ProspectModel,
    steps: Iterator[list[Batch]],
    config: TrainConfig,
    log: Log,
    after_step: Callable[[int], None] = lambda step: None,
) -> StepResult:
    """Run config.steps optimizer steps; `log` gets a line for each, `after_step` how many are done."""
    optimizer = make_optimizer(model, config)
    device = next(model.parameters()).device
    model.train()
    for step, batches in zip(range(config.steps), steps, strict=False):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        result = train_step(model, optimizer, [batch.to(device) for batch in batches], config)
        log({"step": step + 1, **result.__dict__, "lr": lr})
        after_step(step + 1)
    return result


# ---- a run -------------------------------------------------------------------------------------------


def train(
    data: Path, run: Path, config: TrainConfig, frames_root: Path | None = None, progress: bool = True
) -> TrainReport:
    """Train on the `train` split of `data` (written by preprocess) into the new folder `run`.

    `frames_root`: where the videos' .arrow files are; None: as the manifest says. `progress`: a bar on stderr.
    Raises TrainerError for whatever the user can mend, before the first step where possible.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise TrainerError(f"{run}: exists and is not empty; choose a new folder, or remove it")
    split = Split(data, "train")
    held_out, note = _open_eval(data, split, config)
    tokens = train_tiny_tokens(split.texts()) if config.model == "tiny" else load_tokens(config.model)
    model, info = _make_model(split, tokens, config)
    frames = open_frames(split.manifest, frames_root, model.side)
    run.mkdir(parents=True, exist_ok=True)
    session = _Session(run, model, tokens, config, frames, held_out, info)
    started = time.monotonic()
    with _bar(config.steps, progress) as tick:
        steps = step_batches(clip_stream(split, config.seed), tokens, frames, config)
        last = fit(model, steps, config, lambda line: tick(session.log(line)), session.after_step)
    return TrainReport(run, config.steps, time.monotonic() - started, last.loss, session.evaluation, note)


def _open_eval(data: Path, split: Split, config: TrainConfig) -> tuple[Split | None, str | None]:
    if config.eval_split in split.manifest["splits"]:
        return Split(data, config.eval_split), None
    found = ", ".join(sorted(split.manifest["splits"]))
    note = f"no split {config.eval_split!r} to evaluate on, found: {found}; preprocess one, or set --eval-split"
    return None, note


def _make_model(split: Split, tokens: Tokens, config: TrainConfig) -> tuple[ProspectModel, dict[str, Any]]:
    """The model, its head biases at the log-odds that the loss sees, and what a checkpoint says of the data."""
    statistics = split.statistics()
    rates = statistics.positive_rates()
    seen = statistics.positive_rates(of_all=True) if config.reweigh else rates
    vlm = load_model(config.model, len(tokens), config.seed)
    longest = int(vlm.config.text_config.max_position_embeddings)
    if config.max_tokens > longest:
        raise TrainerError(f"max_tokens is {config.max_tokens}, but {config.model} reads {longest}; lower --max-tokens")
    heads = DecisionHeads(int(vlm.config.text_config.hidden_size), (0.5, 0.5) if config.balance == "mean" else seen)
    info = {"data_key": split.key, "positive_rates": rates, "neg_rate": statistics.neg_rate}
    model = ProspectModel(vlm, heads, config.tokens_per_frame, config.freeze_vision)
    return model.to(pick_device()), info


@dataclass
class _Session:
    """What a run writes: metrics as they come, checkpoints and evaluations when they are due."""

    run: Path
    model: ProspectModel
    tokens: Tokens
    config: TrainConfig
    frames: FrameSource
    held_out: Split | None
    info: dict[str, Any]
    evaluation: EvalReport | None = None
    best: float = -1.0

    def log(self, line: dict[str, Any]) -> dict[str, Any]:
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def after_step(self, step: int) -> None:
        every, last = self.config.eval_every, step == self.config.steps
        if last:
            self._save("last", step)
        if self.held_out is not None and (last or (every and step % every == 0)):
            self._evaluate(self.held_out, step)

    def _evaluate(self, split: Split, step: int) -> None:
        scored = list(score_clips(self.model, self.tokens, split.in_order(), self.frames, self.config))
        self.evaluation = report(split.name, scored)
        self.log({"step": step, "evaluation": self.evaluation.to_json()})
        found = [head.ap for head in (self.evaluation.speak, self.evaluation.dst) if head.ap is not None]
        if found and sum(found) / len(found) > self.best:
            self.best = sum(found) / len(found)
            self._save("best", step)

    def _save(self, name: str, step: int) -> None:
        save_checkpoint(self.run / name, self.model, self.tokens, self.config, {"step": step, **self.info})


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Log]:
    """A progress bar on stderr; gives the function that takes each step's line."""
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("train", total=steps, terms="")

        def tick(line: dict[str, Any]) -> None:
            terms = "  ".join(f"{name} {line[name]:.3f}" for name in ("loss", "speak", "dst", "lm"))
            bar.update(task, advance=1, terms=terms)

        yield tick
