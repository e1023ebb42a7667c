"""The trainer's commands, beside those of `pipeline.cli`: the app that `prospect-dst` runs.

Options of a run are the fields of `trainer.config`'s dataclasses (`with_options`). torch is imported when a command
needs it, never for --help.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipeline.cli import RAY_HELP, TELLS_HELP, Given, app, main, names, numbers, with_options
from pipeline.errors import UsageError
from trainer.arms import DEFAULT_RUNGS, RUNGS
from trainer.config import RunOptions, Settings, TrainConfig
from trainer.plan import MOST_SEEDS, Plan, check_plan, ladder

# What `benchmark` takes for this model unless told otherwise: AdamW does not learn the state in as many steps.
NANO = {"steps": 300, "optimizer": "muon", "lr": 4e-3, "clips_per_step": 8, "warmup_steps": 20}
SYNTH_WINDOW = {"early_s": 1.0, "late_s": 1.0}  # events are 2.5 s apart: in a wider one a metronome gets 0.77

_panels = ("Input", "Model", "Measuring", "Other things to measure")
_input, _model, _measure, _others = (partial(Option, rich_help_panel=panel) for panel in _panels)
Data = Annotated[Path, Argument(help="an output folder of preprocess")]
FramesRoot = Annotated[Path | None, _input(help="where the frames are, if they were moved")]
Features = Annotated[Path | None, _input(help="features written by encode, instead of frames")]
Thresholds = Annotated[
    list[str] | None, _model(help="logits speaking=0.5,dst_update=0, instead of those chosen on val")
]
FreeRunning = Annotated[
    bool, _measure("--free-running/--no-free-running", help="also with its own texts in the context")
]
EvalSplit = Annotated[str, _measure(help="split to measure on; thresholds are chosen on val")]


@app.command(epilog="Example: prospect-dst encode labels --model run/last --out features")
def encode(
    data: Data,
    model: Annotated[str, Option(help="whose vision tower: a folder, a name on the hub, or a run")],
    out: Annotated[Path, Option(help="folder for one safetensors file per video; what is there is kept")],
    frames_root: FramesRoot = None,
    tokens_per_frame: Annotated[int, Option(help="tokens kept of a frame, a square number")] = 1,
    dtype: Annotated[str, Option(help="to compute in: float32, bfloat16, or auto: bfloat16 on a GPU")] = "auto",
    store: Annotated[str, Option(help="to keep: float16 or float32")] = "float16",
    keep: Annotated[
        str, Option(help="vision: the connector can still learn; connector: its output, 21 times smaller at 256M")
    ] = "vision",
    batch: Annotated[int, Option(help="frames in one pass of the tower", min=1)] = 32,
    part: Annotated[
        str, Option(help="3/16: the third of 16 shares of the videos; all may write into one --out at once")
    ] = "1/1",
    ray: Annotated[str | None, Option(help=RAY_HELP)] = None,
) -> int:
    """Run the vision tower once over all frames, so that training needs no pixels."""
    from pipeline.cluster import ray_cluster
    from pipeline.dataset import read_manifest
    from pipeline.terminal import command, plain
    from trainer.encode import encode as run

    root = frames_root or read_manifest(data).get("options", {}).get("frames_root")
    needed = [data, *(Path(place) for place in (root, model) if place and Path(place).exists())]
    with ray_cluster(ray, out, needed, gpu=True) as mapper:
        report = run(data, out, model, tokens_per_frame, frames_root, dtype, store, batch, part, mapper, keep)
    for reason in report.refused:
        typer.echo(f"refused: {plain(reason)}", err=True)
    if report.videos:
        per_frame, rate = report.bytes / report.frames / 1000, report.frames / report.seconds
        typer.echo(
            f"{report.videos:,} videos, {report.frames:,} frames in {report.seconds:,.0f} s ({rate:,.1f} frames/s, "
            f"{report.computed}), {report.bytes / 1e6:,.1f} MB ({per_frame:.1f} kB a frame)"
        )
    if report.skipped:
        typer.echo(f"{report.skipped:,} videos were there already; skipped")
    k = [] if tokens_per_frame == 1 else ["--tokens-per-frame", tokens_per_frame]
    frozen = "vision,connector" if keep == "connector" else "vision"
    then = command("train", data, "--run", "RUN", "--model", model, "--features", out, "--freeze", frozen, *k)
    typer.echo(f"next: {then}")
    return 3 if report.refused else 0


@app.command(epilog="Example: prospect-dst train labels --run run --steps 1000")
@with_options(TrainConfig, RunOptions)
def train(
    data: Data,
    run: Annotated[Path, Option(help="folder for checkpoints and metrics: new, unless --resume")],
    resume: Annotated[
        bool, Option(help="go on from RUN/last, with the run's own options, bit for bit as if never stopped")
    ] = False,
    frames_root: FramesRoot = None,
    features: Features = None,
    *,
    given: Given,
) -> int:
    """Train SmolVLM with a speaking and a DST-update head; torchrun starts it on several GPUs."""
    from pipeline.terminal import command, console, plain
    from trainer.checkpoint import resolve_config
    from trainer.train import train as fit

    config = resolve_config(run, given.of(TrainConfig), given.chosen & {f.name for f in fields(TrainConfig)}, resume)
    report = fit(data, run, config, frames_root, features, given.make(RunOptions), resume)
    if not report.is_main:
        return 0
    if report.evaluation is not None:
        from trainer.evaluation.tables import render_report

        console().print(render_report(report.evaluation))
    if report.note is not None:
        typer.echo(report.note)
    resumed = f" after the {report.resumed_from} done before" if report.resumed_from else ""
    steps = report.steps - report.resumed_from
    typer.echo(f"{steps:,} steps in {report.seconds:.0f} s{resumed}, {plain(run)}/curves.svg shows them")
    where = {"--features": features, "--frames-root": frames_root}
    more = [word for option, path in where.items() if path is not None for word in (option, path)]
    typer.echo(f"next: {command('evaluate', run, data, '--split', 'test', *more)}")
    return 0


@app.command(epilog="Example: prospect-dst evaluate run labels --split test")
@with_options(Settings)
def evaluate(
    places: Annotated[
        list[Path] | None, Argument(help="a run of train, a folder of preprocess", metavar="[RUN] DATA")
    ] = None,
    split: EvalSplit = "test",
    out: Annotated[Path | None, Option(help="folder for the results; default: RUN/evaluation-SPLIT")] = None,
    scores: Annotated[
        Path | None, _others(help="a Parquet of scores, ours or another model's; with --chunks also a submission")
    ] = None,
    control: Annotated[
        str | None, _others(help="what needs no model: metronome or history; with DATA and --out alone")
    ] = None,
    threshold: Thresholds = None,
    frames_root: FramesRoot = None,
    features: Features = None,
    free_running: FreeRunning = True,
    updates: Annotated[
        str, _measure(help="free-running, whose state updates it reads: own, or reference (the rung true-state)")
    ] = "own",
    draws: Annotated[int, _measure(help="of the recordings, for the 95% intervals; 0: none", min=0)] = 10_000,
    chunks: Annotated[Path | None, _measure(help="EgoProactive's sessions, JSON Lines: its metrics, too")] = None,
    submission: Annotated[
        Path | None, _measure(help="with --chunks: write the answers to this file, as EgoProactive takes them")
    ] = None,
    *,
    given: Given,
) -> int:
    """Measure how well a run knows when to speak: by frame, by event, free-running, and the state it keeps."""
    from pipeline.terminal import command, console, plain
    from trainer.evaluation.tables import render_evaluation

    settings, places = given.make(Settings), places or []
    if submission is not None and chunks is None:
        raise UsageError("--submission needs --chunks: the sessions that it answers")
    if scores is not None and control is not None:
        raise UsageError("--scores and --control: give one of them")
    answers = scores is not None and scores.suffix == ".jsonl" and chunks is not None
    kind = "a submission" if answers else "--scores" if scores else "--control" if control else ""
    matching, of_any = {field.name for field in fields(Settings)}, {"scores", "control", "out"}
    used = {
        "a submission": {"chunks"},
        "--scores": {"places", "split", "threshold", "draws", "chunks", "submission", *matching},
        "--control": {"places", "split", "free_running", *matching},
    }
    if kind and (unused := sorted(given.chosen - used[kind] - of_any)):
        name = "DATA" if unused[0] == "places" else f"--{unused[0].replace('_', '-')}"
        raise UsageError(f"{name}: not used with {kind}; leave it out")
    if scores is not None:
        from trainer.evaluation.metrics import evaluate_scores, evaluate_submission

        shards, thresholds = (places[-1] if places else None), numbers("--threshold", threshold)
        if answers and chunks is not None:
            result = evaluate_submission(scores, chunks, out)
        else:
            result = evaluate_scores(scores, shards, split, out, settings, thresholds, chunks, submission, draws)
    elif control is not None and len(places) == 1 and out is not None:
        from trainer.controls import score_control

        result = score_control(control, places[0], split, out, 0, settings, free_running)
    elif control is not None or len(places) != 2:
        raise UsageError("evaluate: expected RUN DATA; DATA --scores FILE; or DATA --control NAME --out FOLDER")
    else:
        from trainer.evaluate import evaluate as evaluate_run

        run, data = places
        result = evaluate_run(
            run, data, split, out, frames_root, features, settings, free_running, chunks, submission, draws, updates,
            numbers("--threshold", threshold),
        )  # fmt: skip
    console().print(render_evaluation(result))
    if result.folder is not None:
        typer.echo(f"wrote {plain(result.folder)}: metrics.json" + (", scores as Parquet" if scores is None else ""))
    if scores is None and control is None and "speaking" in result.metrics["thresholds"]["event"]:
        typer.echo(f"next: {command('stream', places[0], 'VIDEO', '--task', places[1], '--clip', f'{split}:0')}")
    return 0


@app.command(epilog="Example: prospect-dst benchmark labels --out answer --hours 8")
@with_options(Settings, TrainConfig, without=("arm", "seed"))
def benchmark(
    data: Annotated[Path, Argument(help="a folder of preprocess, or synth: synthetic data whose answer is known")],
    out: Annotated[Path, Option(help="folder for runs, tables and report.html; what is finished there is kept")],
    rungs: Annotated[
        list[str] | None, Option(help=f"some of {', '.join(RUNGS)}, or all; default: {', '.join(DEFAULT_RUNGS)}")
    ] = None,
    seeds: Annotated[
        int | None, Option(help="runs of each rung; default: 3, with a clock as many as fit", min=1)
    ] = None,
    hours: Annotated[float, Option(help="begin no run that would end later; a later call goes on", min=0)] = 0,
    minutes: Annotated[float, Option(help="the same", min=0)] = 0,
    split: EvalSplit = "test",
    frames_root: FramesRoot = None,
    features: Features = None,
    free_running: FreeRunning = True,
    tells: Annotated[str, Option(help=f"with synth: {TELLS_HELP}")] = "state",
    draws: Annotated[int, _measure(help="of the recordings, for the intervals", min=100)] = 10_000,
    margin: Annotated[float, _measure(help="event F1 that does not matter; settled before any run")] = 0.05,
    jobs: Annotated[int, Option(help="runs at a time; 0: one per GPU, without any one per core", min=0)] = 0,
    *,
    given: Given,
) -> int:
    """Does the dialog state help? Train and evaluate the rungs, matched in all else, and write report.html.

    Stopped by its clock, Ctrl-C or a kill, it leaves a report of the finished runs; the same command goes on.
    """
    from pipeline.dataset import verify
    from pipeline.synth import parse_tells
    from pipeline.terminal import plain
    from trainer.demo import synthetic_data

    until = time.monotonic() + 3600 * hours + 60 * minutes if hours or minutes else math.inf
    on_synth = str(data) == "synth" and not data.exists()
    values = given.values
    usual = {**(NANO if values["model"] == "nano" else {}), **(SYNTH_WINDOW if on_synth else {})}
    values |= {name: value for name, value in usual.items() if name not in given.chosen}
    if "eval_every" not in given.chosen:  # about eight points of the training curve
        values["eval_every"] = max(1, values["steps"] // 8)
    if "warmup_steps" not in given.chosen:
        values["warmup_steps"] = min(values["warmup_steps"], values["steps"])
    if on_synth:
        data = synthetic_data(out, parse_tells(tells), echo=typer.echo)
    many = seeds or (3 if until == math.inf else MOST_SEEDS)
    command_line = shlex.join(["prospect-dst", *sys.argv[1:]]) if sys.argv[1:2] == ["benchmark"] else ""
    hazards = tuple(plain(f"{hazard['split']}: {hazard['text']}") for hazard in verify(data).get("hazards", []))
    plan = Plan(
        data, out, ladder(names(rungs) or DEFAULT_RUNGS), tuple(range(many)), given.make(TrainConfig),
        given.make(Settings), split, frames_root, features, free_running, draws, margin, jobs, command_line, hazards,
    )  # fmt: skip
    check_plan(plan)  # before torch is imported, which takes seconds
    from trainer import benchmark as of

    _stop_as_by_ctrl_c()
    report = of.benchmark(plan, lambda line: typer.echo(plain(line), err=True), until)
    typer.echo(of.answer_of(out))
    typer.echo(f"wrote {plain(report)}")
    return 0


@app.command(epilog="Example: prospect-dst stream run video.mp4 --task task.json --html stream.html")
def stream(
    run: Annotated[Path, Argument(help="a run of train that was evaluated: its thresholds are those chosen on val")],
    video: Annotated[str, Argument(help="a video, a folder of images, an .arrow file, or a camera's number")],
    task: Annotated[
        Path | None,
        _input(help='JSON, {"goal": "Tea", "steps": ["Boil water", "Pour"]}; conversations; or a folder of preprocess'),
    ] = None,
    clip: Annotated[
        str | None, _input(help="which clip of them; of a folder it gives its part of the video and its user, too")
    ] = None,
    fps: Annotated[float | None, _input(help="that the model reads; default: as trained", min=0.01, max=1000)] = None,
    realtime: Annotated[bool, _input("--realtime", help="read a file in real time, skip late frames")] = False,
    stdin: Annotated[
        bool, _input("--stdin", help='read user lines from a file or a pipe, too; "@12.5 text" is due at 12.5 s')
    ] = False,
    threshold: Thresholds = None,
    refractory_s: Annotated[
        float | None, _model(help="seconds of silence after an event; default: as evaluated")
    ] = None,
    max_tokens: Annotated[int | None, _model(help="of the context; default: as trained", min=1)] = None,
    json: Annotated[bool, Option("--json", help="one JSON object per frame on stdout, for programs")] = False,
    html: Annotated[Path | None, Option(help="write a page with the timeline")] = None,
) -> int:
    """Run a trained model live: it reads frame after frame, speaks, keeps the state; type to talk to it."""
    from pipeline.terminal import console, plain
    from trainer.checkpoint import load_run
    from trainer.live.stream import Stream, decoding_config, find_task, html_page, json_lines, terminal_log
    from trainer.live.video_input import UserInput, open_video_input

    if html is not None and html.suffix.lower() not in (".html", ".htm") and html.is_file():
        raise UsageError(f"--html {html}: is there, and its name is no page's; expected a new name, or one in .html")
    loaded = load_run(run)
    decoding = decoding_config(run, numbers("--threshold", threshold), refractory_s)
    example, user_texts = find_task(task, clip, video, fps, trained_fps=loaded.info.get("fps", 2.0))
    part = range(example.start_frame, example.end_frame) or None
    with contextlib.ExitStack() as stack:
        frames = stack.enter_context(open_video_input(video, example.fps, loaded.model.side, realtime, part))
        live = stack.enter_context(Stream(loaded, example, decoding, max_tokens))
        info = live.info(f"camera {video}" if video.isdigit() else video, str(run))
        shows = [stack.enter_context(html_page(html, info))] if html else []
        shows.append(json_lines if json else stack.enter_context(terminal_log(console(), info)))
        reads_stdin = stdin or (sys.stdin is not None and sys.stdin.isatty())  # else a shell loop may own it
        user = UserInput(sys.stdin if reads_stdin else None)
        _stop_as_by_ctrl_c()
        with contextlib.suppress(KeyboardInterrupt):  # the usual end of a camera's stream
            for frame in frames:
                since = range(frame.frame - frame.skipped, frame.frame + 1)
                scripted = [text for number in since for text in user_texts.get(number, ())]
                output = live.step(frame, [*scripted, *user.due(frame.time_s)])
                for show in shows:
                    show(output, frame.image)
    if html is not None and html.exists():
        typer.echo(f"wrote {plain(html)} ({html.stat().st_size / 1e6:,.1f} MB)", err=json)
    return 0


@app.command(epilog="Example: prospect-dst demo")
def demo(
    out: Annotated[Path, Option(help="new folder for everything the demo makes")] = Path("demo"),
    steps: Annotated[int, Option(help="optimizer steps")] = TrainConfig.steps,
    seed: Annotated[int, Option(help="of data, weights and order")] = 0,
) -> int:
    """Do the main job on synthetic data in under five minutes, and show what was learned."""
    from pipeline.terminal import console
    from trainer.demo import demo as run

    run(out, steps, seed, console())
    return 0


def _stop_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP (unless nohup has it ignored) raise KeyboardInterrupt: reports and pages are written."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
