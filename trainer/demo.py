"""The main job on made-up data, from nothing to a trained model's held-out score: synth -> preprocess -> inspect ->
train -> evaluate. Under five minutes on two cores; every step is the command of that name, called as a function.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.errors import UsageError
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.storage import is_vacant, write_text
from pipeline.summary import render_summary
from pipeline.synth import SynthConfig, synth
from pipeline.terminal import command
from pipeline.timeline import timeline
from trainer.evaluation.scored_clip import HeldOutClip, blocks, busiest_clip, render_clip
from trainer.evaluation.tables import render_evaluation

if TYPE_CHECKING:
    from trainer.evaluation.evaluate_scores import Evaluation


def demo(out: Path, steps: int, seed: int, console: Console, made_of: SynthConfig | None = None) -> Evaluation:
    """Do it all below the new folder `out`; returns the held-out report. Raises UsageError if `out` is in use.

    made_of: other data than the default; its seed is replaced by `seed`.
    """
    if out.exists() and (not out.is_dir() or not is_vacant(out)):
        raise UsageError(f"{out}: found files there, expected a new folder; remove it, or choose another --out")
    raw, data, run = out / "raw", out / "data", out / "run"
    step = _Steps(console)

    step("synth", f"made-up task videos with conversations -> {raw}")
    made = synth(raw, replace(made_of or SynthConfig(), seed=seed))
    for split, counts in made.splits.items():
        console.print(
            f"    {split:5} {counts.recordings:4} recordings, {counts.videos:4} videos, {counts.clips:5} clips"
        )

    step("preprocess", f"conversations -> per-frame labels -> {data}")
    manifest, _ = preprocess([raw], data, Options(frames_root=str(raw), seed=seed))
    console.print(render_summary(manifest))

    step("inspect", f"one clip of them ({command('inspect', data, '--clip', 'test:0')})")
    console.print(timeline(data, "test:0"))

    step("train", f"a tiny SmolVLM (1M parameters) from scratch, {steps} steps -> {run}")
    _train(data, run, steps, seed, console)

    step("evaluate", "on the test split: recordings that were never trained on")
    report, scored = _evaluate(run, data)
    console.print(render_evaluation(report))
    for line in blocks(scored):
        console.print(line)
    picture = out / "learned.svg"
    write_text(picture, _picture(scored, raw, report))
    console.print(f"\n[bold]{picture}[/] shows that clip; {step.seconds():.0f} s in all. Yours next:")
    console.print("    prospect-dst preprocess YOUR_training.json --out DATA --frames-root FRAMES")
    return report


class _Steps:
    """Numbers the steps and keeps the time."""

    def __init__(self, console: Console) -> None:
        self.console, self.count, self.began = console, 0, time.monotonic()

    def __call__(self, name: str, what: str) -> None:
        self.count += 1
        self.console.print(f"\n[bold]{self.count}  {name}[/]  {what}  [dim]({self.seconds():.0f} s)[/]")

    def seconds(self) -> float:
        return time.monotonic() - self.began


def _train(data: Path, run: Path, steps: int, seed: int, console: Console) -> None:
    from trainer.config import RunOptions, TrainConfig
    from trainer.train import train

    config = TrainConfig(steps=steps, warmup_steps=min(TrainConfig.warmup_steps, steps), seed=seed)
    report = train(data, run, config, options=RunOptions())
    console.print(f"    {report.steps} steps in {report.seconds:.0f} s, loss of the last one {report.loss:.3f}")


def _evaluate(run: Path, data: Path) -> tuple[Evaluation, HeldOutClip]:
    from trainer.evaluate import evaluate
    from trainer.evaluation.evaluate_scores import TEACHER_FORCED

    found = evaluate(run, data, "test")
    assert found.folder is not None
    return found, busiest_clip(data, found.folder / f"{TEACHER_FORCED}.parquet", "test")


def captions(evaluation: Evaluation) -> dict[str, str]:
    """Per head 'average precision 0.99, chance 0.12', of the frames with the reference's texts in the context."""
    report = evaluation.metrics["teacher-forced"]
    found = {}
    for name, head in (("speaking", "speaking"), ("DST", "dst_update")):
        frames = report[head]["frames"]
        ap = "undefined" if frames["ap"] is None else f"{frames['ap']:.3f}"
        found[name] = f"average precision {ap} on {report['clips']} held-out clips, by chance {frames['chance']:.3f}"
    return found


def _picture(scored: HeldOutClip, raw: Path, report: Evaluation) -> str:
    return render_clip(
        scored, raw, captions(report), "When should the assistant speak, when does the task's state change?"
    )
