"""All steps on synthetic data: synth -> preprocess -> inspect -> train -> evaluate, under five minutes on two cores.

Each step is what the command of that name calls. `synthetic_data` prepares the data of `benchmark synth`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.errors import UsageError
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.schema import HEAD_TITLES
from pipeline.storage import is_vacant, write_text
from pipeline.summary import render_summary
from pipeline.synth import SynthConfig, synth
from pipeline.terminal import command
from pipeline.timeline import Timeline, find_clip
from trainer.config import TrainConfig
from trainer.evaluation.clip_pictures import render_busiest_clip
from trainer.evaluation.tables import render_evaluation

if TYPE_CHECKING:
    from trainer.evaluation.metrics import Evaluation

RECORDINGS = {"train": 300, "val": 20, "test": 40}  # of `synthetic_data`


def demo(out: Path, steps: int, seed: int, console: Console, config: SynthConfig | None = None) -> Evaluation:
    """Do it all below the new folder `out`; returns the held-out report. `config` (but its seed): of the data."""
    from trainer.evaluate import evaluate
    from trainer.train import train

    if not is_vacant(out):
        raise UsageError(f"{out}: found files there, expected a new folder; choose another --out")
    raw, data, run, picture = out / "raw", out / "data", out / "run", out / "learned.svg"
    began = time.monotonic()

    def heading(step: str, description: str) -> None:
        console.print(f"\n[bold]{step}[/]  {description}  [dim]({time.monotonic() - began:.0f} s)[/]")

    heading("1  synth", f"synthetic task videos with conversations -> {raw}")
    config = replace(config or SynthConfig(), seed=seed)
    for split, clips in synth(raw, config).items():
        count = config.recordings[split]
        console.print(f"    {split:5} {count:4} recordings, {count * config.views:4} videos, {clips:5} clips")

    heading("2  preprocess", f"conversations -> per-frame labels -> {data}")
    manifest, _ = preprocess([raw], data, Options(frames_root=str(raw), seed=seed))
    console.print(render_summary(manifest))

    heading("3  inspect", f"one clip of them ({command('inspect', data, '--clip', 'test:0')})")
    console.print(Timeline(*find_clip(data, "test:0")))

    heading("4  train", f"a tiny SmolVLM (1M parameters) from scratch, {steps} steps -> {run}")
    trained = train(data, run, TrainConfig(steps=steps, warmup_steps=min(TrainConfig.warmup_steps, steps), seed=seed))
    console.print(f"    {trained.steps} steps in {trained.seconds:.0f} s, loss of the last one {trained.loss:.3f}")

    heading("5  evaluate", "on the test split: recordings that were never trained on")
    evaluation = evaluate(run, data, "test")
    console.print(render_evaluation(evaluation))
    report, captions = evaluation.metrics["teacher-forced"], {}
    for head, name in HEAD_TITLES.items():
        ap, chance = (report[head]["frames"][value] for value in ("ap", "chance"))
        reached = f"average precision {'undefined' if ap is None else f'{ap:.3f}'}"
        captions[name] = f"{reached} on {report['clips']} held-out clips, by chance {chance:.3f}"
    title = "When should the assistant speak, when does the task's state change?"
    scores = run / "evaluation-test" / "teacher-forced.parquet"
    write_text(picture, render_busiest_clip(data, scores, "test", raw, captions, title))
    console.print(f"\n[bold]{picture}[/] shows that clip; {time.monotonic() - began:.0f} s in all. Next:")
    console.print("    prospect-dst preprocess YOUR_training.json --out DATA --frames-root FRAMES")
    return evaluation


def synthetic_data(out: Path, tells: Mapping[str, float], echo: Callable[[str], None]) -> Path:
    """OUT/synth-TELLS/data, made unless it is there; `tells`: what tells when to speak (`pipeline.synth`).

    Labels are onsets, so that a text stands in training where it stands live: right after the frame that fires.
    """
    name = ",".join(source if share == 1 else f"{source}={share:g}" for source, share in tells.items() if share)
    raw, data = (out / f"synth-{name}" / folder for folder in ("raw", "data"))
    if not raw.exists():
        synth(raw, SynthConfig(recordings=RECORDINGS, views=1, tells=tells))
        echo(f"made {sum(RECORDINGS.values())} recordings in {raw}")
    preprocess([raw], data, Options(frames_root=str(raw), positive="onset"))
    return data
