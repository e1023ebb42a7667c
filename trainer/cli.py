"""The front door: every command on one page. It parses, calls a plain function, and alone makes exit statuses.

0 done; 1 bad input; 2 bad usage; 3 done, with clips quarantined. What a command needs is imported when it is
called, so that --help answers in a fifth of a second and the data commands run where torch is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import InputError, UsageError
from trainer.arms import ARMS  # plain data, no torch
from trainer.config import PARTS, RunOptions, Settings, TrainConfig

if TYPE_CHECKING:
    from pipeline.cluster import Mapper

RAY_HELP = "run on a Ray cluster: local, auto, host:port or ray://host:port (pip install 'prospect-dst[ray]')"

app = typer.Typer(
    name="prospect-dst",
    help="When should the assistant speak? Frame labels you can query, and a lean trainer for SmolVLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def preprocess(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="JSON / JSON Lines files, folders of them; names tell the split", readable=False),
    ],
    out: Annotated[Path, typer.Option(help="output folder; replaced whole, or left as it was")],
    positive: Annotated[str, typer.Option(help="span: every frame of an event; onset: its first alone")] = "span",
    neg_rate: Annotated[
        list[str] | None,
        typer.Option(help="share of silent frames to supervise: 0.3, or by split train=0.3,val=1"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling draws")] = 0,
    pad_s: Annotated[float, typer.Option(help="widen each clip by so many seconds on both sides")] = 0.0,
    split: Annotated[str | None, typer.Option(help="split of inputs whose names tell none")] = None,
    force_split: Annotated[bool, typer.Option(help="--split also where a file's name tells another")] = False,
    fps: Annotated[float | None, typer.Option(help="frames a second of clips that do not say; default: 2")] = None,
    bounds: Annotated[
        str, typer.Option(help="of clips: given, turns, or auto: given, unless a file's span its DST updates alone")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="processes; 0: one per core. Never changes a byte", min=0)] = 0,
    frames_root: Annotated[
        Path | None, typer.Option(help="check annotations against the frames below this folder")
    ] = None,
    frame_convention: Annotated[
        str | None, typer.Option(help="event, window or lead-in, instead of finding out")
    ] = None,
    recording_regex: Annotated[
        str | None, typer.Option(help="what of a video_uid names the recording (first group, or whole match)")
    ] = None,
    on_error: Annotated[str, typer.Option(help="quarantine: set bad clips aside; fail: stop")] = "quarantine",
    ray: Annotated[str | None, typer.Option(help=RAY_HELP)] = None,
) -> int:
    """Turn conversations into Parquet shards of per-frame labels."""
    from pipeline.card import CARD, is_ours
    from pipeline.options import ASSEMBLY101, Options
    from pipeline.preprocess import preprocess as run
    from pipeline.summary import render_summary, summary_of
    from pipeline.terminal import console, plain, progress_bar

    options = Options(
        seed=seed,
        positive=positive,
        neg_rate=_rates(neg_rate or []),
        pad_s=pad_s,
        split=split,
        force_split=force_split,
        fps=fps,
        bounds=bounds,
        frame_convention=frame_convention,
        recording_regex=ASSEMBLY101 if recording_regex is None else recording_regex,
        frames_root=None if frames_root is None else str(frames_root),
        on_error=on_error,
    )
    needed = [*inputs, *([frames_root] if frames_root else [])]
    with _cluster(ray, out, needed, workers=workers) as mapper, progress_bar() as progress:
        manifest, skipped = run(inputs, out, options, workers or _cores(), progress, mapper)
    if skipped:
        typer.echo(f"{plain(out)}: nothing changed since the last run (same inputs, options and version); skipped")
    else:
        console().print(render_summary(summary_of(manifest), manifest))
    if not is_ours(out / CARD):
        typer.echo(f"{plain(out / CARD)}: not, or no longer, the card that preprocess writes; left as it is", err=True)
    if manifest["quarantined"]:
        typer.echo(f"{manifest['quarantined']} refused: each has a line in {plain(out)}/quarantine.jsonl", err=True)
    return int(manifest["status"])


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="an output folder of preprocess")],
    clip: Annotated[str | None, typer.Option(help="show one clip's timeline: its id, number, or part of an id")] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page with many timelines")] = None,
) -> int:
    """Look at shards: the summary, one clip's timeline, or a page of timelines."""
    from pipeline import output as shards
    from pipeline import timeline
    from pipeline import viewer as inspect_html
    from pipeline.inspect import summarise
    from pipeline.summary import render_summary
    from pipeline.terminal import console, plain

    manifest = shards.verify(folder)
    if clip is not None:
        console().print(timeline.timeline(folder, clip))
    elif html is None:
        console().print(render_summary(summarise(folder), manifest))
    if html is not None:
        inspect_html.write_page(folder, html, manifest=manifest)
        typer.echo(f"wrote {plain(html)} ({html.stat().st_size / 1000:,.0f} kB)")
    return 0


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="new folder for {split}_training.json and frames/*.arrow")],
    train: Annotated[int, typer.Option(help="recordings in the train split")] = 190,
    val: Annotated[int, typer.Option(help="recordings in the val split")] = 15,
    test: Annotated[int, typer.Option(help="recordings in the test split")] = 15,
    views: Annotated[int, typer.Option(help="camera views per recording")] = 2,
    difficulty: Annotated[float, typer.Option(help="of seeing: 0 easy .. 1 hard")] = 0.25,
    state_tells: Annotated[
        float, typer.Option(help="how much of when to speak only the task's state tells: 0 nothing .. 1 all")
    ] = 0.0,
    px: Annotated[int, typer.Option(help="side of the square frames, pixels")] = 64,
    seed: Annotated[int, typer.Option(help="same seed, same bytes")] = 0,
) -> int:
    """Make task videos with conversations, in the files a user has."""
    from pipeline.synth import SynthConfig
    from pipeline.synth import synth as run
    from pipeline.terminal import command

    recordings = {split: n for split, n in {"train": train, "val": val, "test": test}.items() if n}
    config = SynthConfig(
        recordings=recordings, views=views, difficulty=difficulty, state_tells=state_tells, px=px, seed=seed
    )
    report = run(out, config)
    for split, counts in report.splits.items():
        typer.echo(f"{split:5} {counts.recordings} recordings, {counts.videos} videos, {counts.clips} clips")
    typer.echo(f"next: {command('preprocess', out, '--out', 'DATA', '--frames-root', out)}")
    return 0


@app.command()
def encode(
    data: Annotated[Path, typer.Argument(help="an output folder of preprocess")],
    model: Annotated[str, typer.Option(help="whose vision tower: a folder, a name on the hub, or a run")],
    out: Annotated[Path, typer.Option(help="folder for one safetensors file per video; what is there is kept")],
    frames_root: Annotated[Path | None, typer.Option(help="where the frames are, if moved")] = None,
    tokens_per_frame: Annotated[
        int, typer.Option(help="tokens kept of a frame, a square number")
    ] = TrainConfig.tokens_per_frame,
    dtype: Annotated[
        str, typer.Option(help="to compute in: float32, bfloat16, or auto: bfloat16 on a GPU where it is close")
    ] = "auto",
    store: Annotated[str, typer.Option(help="to keep: float16 or float32")] = "float16",
    keep: Annotated[
        str,
        typer.Option(help="vision: the connector can still learn; connector: its output, 21 times smaller at 256M"),
    ] = "vision",
    batch: Annotated[int, typer.Option(help="frames in one pass of the tower")] = 32,
    part: Annotated[
        str, typer.Option(help="3/16: the third of 16 shares of the videos; all may write into one --out at once")
    ] = "1/1",
    ray: Annotated[str | None, typer.Option(help=RAY_HELP)] = None,
) -> int:
    """Run the vision tower once over all frames, so that training needs no pixels."""
    from pipeline.dataset import read_manifest
    from pipeline.terminal import command, plain
    from trainer.encode import TOLERANCE
    from trainer.encode import encode as run

    share = _share(part)
    root = frames_root or read_manifest(data).get("options", {}).get("frames_root")
    needed = [data, *([Path(root)] if root else []), *([Path(model)] if Path(model).exists() else [])]
    with _cluster(ray, out, needed, gpu=True) as mapper:
        report = run(
            data, out, model, tokens_per_frame, frames_root, dtype, store, batch, part=share, mapper=mapper, keep=keep
        )
    if not report.videos and not report.skipped:
        typer.echo(f"no video falls to part {part}")
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
    if report.probe is not None:
        typer.echo(f"bfloat16 is off by {report.probe:.2%} of a feature's length (at most {TOLERANCE:.0%})")
    if report.refused:
        typer.echo(f"refused in all: {len(report.refused)}; mend them and run again, the rest is kept", err=True)
    k = [] if tokens_per_frame == TrainConfig.tokens_per_frame else ["--tokens-per-frame", tokens_per_frame]
    frozen = "vision,connector" if keep == "connector" else "vision"
    then = command("train", data, "--run", "RUN", "--model", model, "--features", out, "--freeze", frozen, *k)
    typer.echo(f"next: {then}")
    return report.status


@app.command()
def train(
    ctx: typer.Context,
    data: Annotated[Path, typer.Argument(help="an output folder of preprocess")],
    run: Annotated[Path, typer.Option(help="folder for checkpoints and metrics: new, unless --resume")],
    resume: Annotated[
        bool, typer.Option(help="go on from RUN/last, with the run's own options, bit for bit as if never stopped")
    ] = False,
    arm: Annotated[str, typer.Option(help=f"what it reads of the state: {', '.join(ARMS)}")] = TrainConfig.arm,
    model: Annotated[
        str, typer.Option(help="tiny or nano (random), a folder, a run, or a name on the hub")
    ] = TrainConfig.model,
    frames_root: Annotated[Path | None, typer.Option(help="where the frames are, if moved")] = None,
    features: Annotated[Path | None, typer.Option(help="what encode wrote, instead of frames")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = TrainConfig.steps,
    clips_per_step: Annotated[int, typer.Option(help="clips in one optimizer step")] = TrainConfig.clips_per_step,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = TrainConfig.lr,
    lr_by_part: Annotated[
        list[str] | None, typer.Option(help=f"another peak for a part: heads=1e-3,connector=1e-4 ({', '.join(PARTS)})")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="linear, then cosine to 0; default: 40, or all steps")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="on matrices")] = TrainConfig.weight_decay,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm")] = TrainConfig.grad_clip,
    balance: Annotated[str, typer.Option(help="none, or mean: both classes weigh equally")] = TrainConfig.balance,
    reweigh: Annotated[bool, typer.Option(help="drawn negatives weigh 1 / rate")] = TrainConfig.reweigh,
    tokens_per_frame: Annotated[
        int, typer.Option(help="tokens of a frame, a square number")
    ] = TrainConfig.tokens_per_frame,
    max_tokens: Annotated[int, typer.Option(help="longest window; longer clips are cut")] = TrainConfig.max_tokens,
    micro_batch_tokens: Annotated[
        int, typer.Option(help="tokens of one forward pass: memory against speed")
    ] = TrainConfig.micro_batch_tokens,
    w_speak: Annotated[float, typer.Option(help="weight of the speaking head's loss")] = TrainConfig.w_speak,
    w_dst: Annotated[float, typer.Option(help="weight of the DST head's loss")] = TrainConfig.w_dst,
    w_lm: Annotated[float, typer.Option(help="weight of the text's loss")] = TrainConfig.w_lm,
    freeze: Annotated[list[str] | None, typer.Option(help="parts that do not learn: vision,connector,text")] = None,
    lora_rank: Annotated[int, typer.Option(help="above 0: the text learns by adapters (peft)")] = TrainConfig.lora_rank,
    lora_alpha: Annotated[int, typer.Option(help="adapters are scaled by alpha / rank")] = TrainConfig.lora_alpha,
    bf16: Annotated[
        bool | None,
        typer.Option(
            help="autocast to bfloat16; default: on a GPU. Without it attention there takes no flash kernel: an "
            "estimated 3 times the time of a step",
            show_default=False,
        ),
    ] = TrainConfig.bf16,
    checkpointing: Annotated[
        bool, typer.Option(help="recompute activations: less memory, more time")
    ] = TrainConfig.checkpointing,
    compile: Annotated[bool, typer.Option(help="torch.compile the text layers")] = TrainConfig.compile,
    eval_split: Annotated[str, typer.Option(help="split to evaluate on")] = TrainConfig.eval_split,
    eval_every: Annotated[int, typer.Option(help="steps between; 0: at the end")] = TrainConfig.eval_every,
    seed: Annotated[int, typer.Option(help="of weights and order")] = TrainConfig.seed,
    workers: Annotated[
        int | None,
        typer.Option(
            help="processes that read two steps ahead each, frames included; default: none on a CPU, one per core but "
            "one, at most 8, on a GPU. Changes no result",
            show_default=False,
        ),
    ] = RunOptions.workers,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = RunOptions.save_every,
    fsdp: Annotated[bool, typer.Option(help="under torchrun: shard the model, not copy it")] = RunOptions.fsdp,
    log: Annotated[str | None, typer.Option(help="also to wandb or trackio")] = RunOptions.logger,
) -> int:
    """Train SmolVLM with a speaking and a DST-update head; torchrun starts it on several GPUs."""
    from pipeline.terminal import command, console, plain
    from trainer.run_folder import start_config
    from trainer.train import train as fit

    config = start_config(run, *_training_options(ctx), resume)
    options = RunOptions(workers=workers, save_every=save_every, fsdp=fsdp, logger=log)
    report = fit(data, run, config, frames_root, features, options, resume)
    if not report.is_main:
        return 0
    if report.evaluation is not None:
        from trainer.evaluation.tables import render_report

        console().print(render_report(report.evaluation))
    if report.note is not None:
        typer.echo(report.note)
    resumed = f" after the {report.resumed_from} done before" if report.resumed_from else ""
    steps = report.steps - report.resumed_from
    typer.echo(f"{steps} steps in {report.seconds:.0f} s{resumed}, {plain(run)}/curves.svg shows them")
    where = {"--features": features, "--frames-root": frames_root}
    more = [word for option, path in where.items() if path is not None for word in (option, path)]
    typer.echo(f"next: {command('evaluate', run, data, '--split', 'test', *more)}")
    return 0


@app.command()
def evaluate(
    places: Annotated[
        list[Path] | None, typer.Argument(help="a run of train, a folder of preprocess", metavar="[RUN] DATA")
    ] = None,
    split: Annotated[str, typer.Option(help="split to measure on; thresholds are chosen on val")] = "test",
    out: Annotated[Path | None, typer.Option(help="folder for the results; default: RUN/evaluation-SPLIT")] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="measure this Parquet of scores instead, ours or another model's; with --chunks also a submission"
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="with --scores: logits speaking=0.5,dst_update=0, instead of val's best")
    ] = None,
    frames_root: Annotated[Path | None, typer.Option(help="where the frames are, if moved")] = None,
    features: Annotated[Path | None, typer.Option(help="what encode wrote, instead of frames")] = None,
    self_fed: Annotated[bool, typer.Option(help="also frame by frame, the model's own texts in the context")] = True,
    early_s: Annotated[float, typer.Option(help="seconds that an event may come too early")] = Settings.early_s,
    late_s: Annotated[float, typer.Option(help="seconds that it may come too late")] = Settings.late_s,
    refractory_s: Annotated[float, typer.Option(help="seconds of silence after an event")] = Settings.refractory_s,
    sentence_encoder: Annotated[
        Path | None, typer.Option(help="a sentence-transformers folder: match what is said by meaning, too")
    ] = None,
    chunks: Annotated[
        Path | None, typer.Option(help="sessions of EgoProactive (JSON Lines), for its metrics per chunk")
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="with --chunks: write the answers to this file, as EgoProactive takes them")
    ] = None,
) -> int:
    """How well does it know when to speak: frame by frame, event by event, on its own texts; the state it keeps."""
    from pipeline.terminal import command, console, plain
    from trainer.evaluation.tables import render_evaluation

    settings, places = Settings(early_s, late_s, refractory_s), places or []
    if submission is not None and chunks is None:
        raise UsageError("--submission needs --chunks: the sessions that it answers")
    if scores is not None and scores.suffix == ".jsonl":
        if chunks is None or places or threshold or submission:
            raise UsageError(f"{scores}: to score a submission takes --scores and --chunks alone, and perhaps --out")
        from trainer.evaluation.evaluate_scores import evaluate_submission

        found = evaluate_submission(scores, chunks, out)
    elif scores is None:
        if len(places) != 2:
            raise UsageError(f"evaluate {' '.join(map(plain, places))}: expected RUN DATA, or DATA with --scores FILE")
        from trainer.evaluate import evaluate as of_run

        run, data = places
        found = of_run(
            run, data, split, out, frames_root, features, settings, self_fed, sentence_encoder, chunks, submission
        )
    else:
        unused = {"--features": features, "--frames-root": frames_root, "--no-self-fed": not self_fed or None}
        if wrong := [name for name, value in unused.items() if value is not None]:
            raise UsageError(f"{wrong[0]}: no model runs with --scores; drop one of them")
        from trainer.evaluation.evaluate_scores import evaluate_scores

        given = _numbers("--threshold", threshold or [], "speaking=0.5")
        where = places[-1] if places else None
        found = evaluate_scores(scores, where, split, out, settings, given, sentence_encoder, chunks, submission)
    console().print(render_evaluation(found))
    if found.folder is not None:
        typer.echo(f"wrote {plain(found.folder)}: metrics.json" + (", scores as Parquet" if scores is None else ""))
    if scores is None:
        typer.echo(f"next: {command('stream', places[0], 'VIDEO', '--task', places[1], '--clip', f'{split}:0')}")
    return 0


def _with_options_of_train(command: Any) -> Any:
    """The command, which also takes every option of train that is a field of TrainConfig, but the arm and the seed."""
    taken = signature(command, eval_str=True)
    train_options = [
        parameter
        for name, parameter in signature(train, eval_str=True).parameters.items()
        if name in TrainConfig.__dataclass_fields__ and name not in ("arm", "seed")
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> int:
        return int(command(**{name: value for name, value in given.items() if name in taken.parameters}))

    parameters = [*taken.parameters.values(), *train_options]
    wrapped.__signature__ = taken.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


@app.command()
@_with_options_of_train
def benchmark(
    ctx: typer.Context,
    data: Annotated[Path, typer.Argument(help="a folder of preprocess, or synth: made-up data whose answer is known")],
    out: Annotated[Path, typer.Option(help="folder for runs, tables and report.html; what is finished there is kept")],
    arms: Annotated[list[str] | None, typer.Option(help=f"some of {','.join(ARMS)}; default: all")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each arm: weights and order differ", min=1)] = 3,
    split: Annotated[str, typer.Option(help="split to measure on; thresholds are chosen on val")] = "test",
    frames_root: Annotated[Path | None, typer.Option(help="where the frames are, if moved")] = None,
    features: Annotated[Path | None, typer.Option(help="what encode wrote, instead of frames")] = None,
    self_fed: Annotated[bool, typer.Option(help="also frame by frame, the model's own texts in the context")] = True,
    state_tells: Annotated[
        float, typer.Option(help="with synth: how much of when to speak only the state tells, 0 to 1")
    ] = 1.0,
    early_s: Annotated[float, typer.Option(help="seconds that an event may come too early")] = Settings.early_s,
    late_s: Annotated[float, typer.Option(help="seconds that it may come too late")] = Settings.late_s,
    refractory_s: Annotated[float, typer.Option(help="seconds of silence after an event")] = Settings.refractory_s,
    draws: Annotated[int, typer.Option(help="of the recordings, for the intervals", min=100)] = 10_000,
    jobs: Annotated[int, typer.Option(help="runs at a time; 0: one per GPU, without any one per core", min=0)] = 0,
) -> int:
    """Does the dialog state help? Trains and evaluates the arms, matched in all else, and writes report.html."""
    from pipeline.inspect import told_hazards
    from pipeline.terminal import plain
    from trainer import benchmark as of
    from trainer.run_folder import start_config
    from trainer.synthetic_data import make

    values, chosen = _training_options(ctx)
    if "eval_every" not in chosen:  # about eight points of the training curve
        values["eval_every"] = max(1, values["steps"] // 8)
    config = start_config(out, values, chosen)
    if str(data) == "synth" and not data.exists():
        data = make(out, state_tells, echo=typer.echo)
    plan = of.Plan(
        data=data,
        out=out,
        arms=tuple(_names(arms or [])) or tuple(ARMS),
        seeds=tuple(range(seeds)),
        config=config,
        settings=Settings(early_s, late_s, refractory_s),
        split=split,
        frames_root=frames_root,
        features=features,
        live=self_fed,
        draws=draws,
        jobs=jobs,
        command=shlex.join(["prospect-dst", *sys.argv[1:]]) if sys.argv[1:2] == ["benchmark"] else "",
        hazards=tuple(told_hazards(data)),
    )
    report = of.benchmark(plan, lambda line: typer.echo(plain(line), err=True))
    typer.echo(of.answer_of(out))
    typer.echo(f"wrote {plain(report)}")
    return 0


@app.command()
def stream(
    run: Annotated[Path, typer.Argument(help="a run of train, evaluated: its thresholds are val's")],
    video: Annotated[str, typer.Argument(help="a video, a folder of images, an .arrow file, or a camera's number")],
    task: Annotated[
        Path | None,
        typer.Option(help="what is being done: JSON with goal and steps, conversations, or a folder of preprocess"),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="which clip --task means; one of preprocess gives its frames and user, too")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="logits speaking=0.5,dst_update=0, instead of those chosen on val")
    ] = None,
    refractory_s: Annotated[
        float | None, typer.Option(help="seconds of silence after an event; default: as evaluated")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second that the model sees; default: as trained")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="of the context; default: as trained", min=1)] = None,
    source_fps: Annotated[
        float | None, typer.Option(help="at which a folder's images were taken; default: each is a frame")
    ] = None,
    realtime: Annotated[bool, typer.Option(help="give a file's frames when they are due, skip what is late")] = False,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="hear lines from a file or a pipe, too, as from a terminal")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object per frame on stdout, for programs")] = False,
    html: Annotated[Path | None, typer.Option(help="keep a page with the timeline, to hover over")] = None,
) -> int:
    """Run a trained model live: it sees frame after frame, speaks, keeps the state; type to talk to it."""
    from dataclasses import asdict

    from pipeline.terminal import console, plain
    from trainer.checkpoint import load_run
    from trainer.live import sinks as recording
    from trainer.live.stream import Stream, live_of
    from trainer.live.task import find_task
    from trainer.live.video_input import Listener, open_feed

    loaded = load_run(run)
    live = live_of(run, _numbers("--threshold", threshold or [], "speaking=0.5"), refractory_s)
    html = _recording(html, Path(video), task)
    if json and sys.stdout is None:
        raise UsageError("--json: stdout is closed")
    about_task = find_task(task, clip, video, fps, trained=loaded.info.get("fps", 2.0))
    with contextlib.ExitStack() as open_now:
        side, first = loaded.model.side, about_task.first
        feed = open_now.enter_context(open_feed(video, about_task.fps, side, realtime, source_fps, first))
        stream = open_now.enter_context(Stream(loaded, about_task.clip, live, max_tokens))
        about: Any = stream.about(feed.name) | {"run": str(run)}
        sinks = [recording.json_lines(sys.stdout) if json else recording.terminal(console(), about)]
        sinks += [recording.html(html, about)] if html else []
        for sink in sinks:
            open_now.enter_context(sink)
        heard = stdin or (sys.stdin is not None and sys.stdin.isatty())  # else it is the shell loop's around this
        listener = Listener(sys.stdin if heard else None)
        ended = open_now.enter_context(_ended_by_signals())
        with contextlib.suppress(KeyboardInterrupt):  # the usual end of a camera's stream
            listener.wait()  # for a script; before the first frame, which a clock may give
            for seen in about_task.cut(feed):
                said = [*about_task.heard(seen), *listener.heard(seen.time_s)]
                moment = asdict(stream.see(seen, said))
                for sink in sinks:
                    sink.show(moment, seen.image)
    if html is not None and html.exists():
        typer.echo(f"wrote {plain(html)} ({html.stat().st_size / 1e6:,.1f} MB)", err=json)
    return ended[0] if ended else 0


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="new folder for everything the demo makes")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="optimizer steps")] = TrainConfig.steps,
    seed: Annotated[int, typer.Option(help="of data, weights and order")] = 0,
) -> int:
    """Do the main job on made-up data in under five minutes, and show what was learned."""
    from pipeline.terminal import console
    from trainer.demo import demo as run

    run(out, steps, seed, console())
    return 0


def _training_options(ctx: typer.Context) -> tuple[dict[str, Any], set[str]]:
    """(every field of a TrainConfig that the command has an option for, those that the user wrote)."""
    given = {name: value for name, value in ctx.params.items() if name in TrainConfig.__dataclass_fields__}
    given["lr_by_part"] = _numbers("--lr-by-part", given["lr_by_part"] or [])
    given["freeze"] = _names(given["freeze"] or [])
    return given, {name for name in given if _was_given(ctx, name)}


def _rates(given: list[str]) -> dict[str, float]:
    """--neg-rate values as {split: rate}; '*' stands for every split not named."""
    return _numbers("--neg-rate", given, "0.3, or train=0.3,val=1", anonymous="*")


def _numbers(
    option: str, given: list[str], example: str = "heads=1e-3", anonymous: str | None = None
) -> dict[str, float]:
    """name=number items, over commas and repeats; a number without a name is `anonymous`'s, if that may be."""
    numbers: dict[str, float] = {}
    for item in ",".join(given).split(",") if given else []:
        name, equals, number = item.rpartition("=")
        try:
            if not name.strip() and (equals or anonymous is None):
                raise ValueError
            numbers[name.strip() or str(anonymous)] = float(number)
        except ValueError:
            raise UsageError(f"{option} {item!r}: expected something like {example}") from None
    return numbers


def _names(given: list[str]) -> list[str]:
    """The items of a repeatable option, split at commas."""
    return [item.strip() for item in ",".join(given).split(",") if item.strip()]


def _recording(html: Path | None, video: Path, task: Path | None) -> Path | None:
    """The page to write, links followed; UsageError where it would replace what is read, or is no file."""
    if html is None:
        return None
    html = html.resolve()
    if html in (video.resolve(), task and task.resolve()):
        raise UsageError("--html names a file that is read, expected another one")
    if html.exists() and not html.is_file() and not html.is_dir():
        raise UsageError(f"{html}: no regular file, expected the name of one to write")
    if video.is_dir() and html.parent == video.resolve():
        raise UsageError(f"{html}: among the images that are read, expected another folder")
    return html


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP stop what is done as Ctrl-C does; the list gets the exit status that they ask for."""
    statuses: list[int] = []

    def stop(number: int, _: Any) -> None:
        statuses.append(128 + number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield statuses
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _share(part: str) -> tuple[int, int]:
    """(3, 16) from '3/16'."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise UsageError(f"--part {part!r}: expected something like 3/16")
    return int(number), int(parts)


def _cluster(
    address: str | None, out: Path, needed: list[Path], workers: int = 0, gpu: bool = False
) -> contextlib.AbstractContextManager[Mapper | None]:
    """The Ray cluster of that address; None: none is asked for."""
    if address is None:
        return contextlib.nullcontext()
    from pipeline.cluster import ray_cluster

    return ray_cluster(address, out, needed, workers, gpu)


def _was_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user wrote this option."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Every failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = app(argv if argv is not None else sys.argv[1:], prog_name="prospect-dst", standalone_mode=False)
    except UsageError as error:
        return _fail(f"{error}; see --help", 2)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except InputError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check space and permissions, then run again", 1)
    except UnicodeEncodeError as error:
        return _fail(f"{error.object}: not UTF-8, as Arrow needs paths to be; rename it", 1)
    except Exception as error:
        if (parsed := _parser_status(error)) is not None:
            return parsed
        if any(kind.__name__ == "InputError" for kind in type(error).__mro__):
            return _fail(str(error), 1)
        if os.environ.get("PROSPECT_DST_TRACEBACK"):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"unexpected {message}; this is a bug: PROSPECT_DST_TRACEBACK=1 shows where", 1)
    if status == 130:  # typer's word for Ctrl-C
        return _fail(INTERRUPTED, 130)
    return status if isinstance(status, int) else 0


INTERRUPTED = "stopped; nothing half-written is left"


def _parser_status(error: Exception) -> int | None:
    """Exit status of the command-line parser's own errors (typer's, or click's under older typers)."""
    name = type(error).__name__
    if name == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if name == "Abort":
        return _fail(INTERRUPTED, 130)
    if not hasattr(error, "format_message"):
        return None
    return _fail(f"{' '.join(error.format_message().split())}; see --help", 2)


def _fail(message: str, status: int) -> int:
    from pipeline.terminal import plain

    print(f"prospect-dst: {plain(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
