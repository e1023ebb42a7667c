"""The commands of the offline stage (preprocess, inspect, synth), and what every command of ours shares.

A command parses its options, calls a plain function and returns an exit status: 0 done, 1 bad input, 2 bad usage, 3
done with clips quarantined. What it needs is imported when it is called, so that --help answers at once. `trainer.cli`
adds the trainer's commands; this module alone runs without torch (`python -m pipeline.cli preprocess ...`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version as version_of
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer import Argument, Option

from pipeline.errors import InputError, UsageError
from pipeline.options import Options

RAY_HELP = "run on a Ray cluster: local, auto, host:port or ray://host:port (pip install 'prospect-dst\\[ray]')"
TELLS_HELP = "what tells when to speak: vision, state, user, history, nothing, or shares: state=0.7,vision=0.3"
Config = TypeVar("Config")

app = typer.Typer(
    name="prospect-dst",
    help="When should the assistant speak? Frame labels you can query, and a lean trainer for SmolVLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"prospect-dst {version_of('prospect-dst')}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None: ...


@dataclass(frozen=True)
class Given:
    """Values of the options that `with_options` added to a command, and the names of all that the user wrote."""

    values: dict[str, Any]
    chosen: set[str]

    def of(self, config: type) -> dict[str, Any]:
        return {field.name: self.values[field.name] for field in fields(config) if field.name in self.values}

    def make(self, config: type[Config]) -> Config:
        return config(**self.of(config))


def with_options(*configs: type, without: tuple[str, ...] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The command also takes an option for each field of `configs` that has a typer.Option; it gets them as `given`.

    A field of type dict[str, float] is written as name=number items, a tuple of strings as names.
    """
    options: dict[str, Parameter] = {}
    kinds: dict[str, Any] = {}
    for config in configs:
        hints = get_type_hints(config, include_extras=True)
        for field in fields(config):
            if get_origin(hints[field.name]) is Annotated and field.name not in without:
                kind, option = get_args(hints[field.name])
                kinds[field.name] = get_origin(kind)
                several = kinds[field.name] in (dict, tuple)
                default = None if several or field.default is MISSING else field.default
                hint: Any = Annotated[list[str] | None, option] if several else hints[field.name]
                options[field.name] = Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def wrapped(ctx: typer.Context, **values: Any) -> int:
            given = {name: values.pop(name) for name in options}
            for name, kind in kinds.items():
                if kind is dict:
                    given[name] = numbers(f"--{name.replace('_', '-')}", given[name])
                elif kind is tuple:
                    given[name] = tuple(names(given[name]))
            chosen = {name for name in ctx.params if ctx.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]
            return command(**values, given=Given(given, chosen))

        context = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "given"]
        parameters = [context, *own, *options.values()]
        wrapped.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def numbers(option: str, given: list[str] | None) -> dict[str, float]:
    """name=number items, over commas and repeats; a number alone stands for every name ('*')."""
    values: dict[str, float] = {}
    for item in names(given) or given or []:
        name, _, number = (part.strip() for part in (item if "=" in item else f"*={item}").rpartition("="))
        try:
            values[name] = float(number if name else "")
        except ValueError:
            raise UsageError(f"{option} {item!r}: expected a number, or name=number items with commas") from None
    return values


def names(given: list[str] | None) -> list[str]:
    """The items of a repeatable option, split at commas."""
    return [item.strip() for item in ",".join(given or []).split(",") if item.strip()]


@app.command(epilog="Example: prospect-dst preprocess conversations/ --out labels --frames-root frames/")
@with_options(Options)
def preprocess(
    inputs: Annotated[
        list[Path], Argument(help="JSON or JSON Lines files, or folders; names tell the split", readable=False)
    ],
    out: Annotated[Path, Option(help="output folder; replaced as a whole, or left as it was")],
    workers: Annotated[int, Option(help="processes; 0: one per core. Does not change the output", min=0)] = 0,
    ray: Annotated[str | None, Option(help=RAY_HELP)] = None,
    *,
    given: Given,
) -> int:
    """Turn conversations into Parquet shards of per-frame labels."""
    from pipeline.cluster import available_cores, ray_cluster
    from pipeline.preprocess import preprocess as run
    from pipeline.schema import QUARANTINE
    from pipeline.summary import CARD, is_our_card, render_summary
    from pipeline.terminal import console, plain, progress_bar

    options = given.make(Options)
    needed = [*inputs, *([Path(options.frames_root)] if options.frames_root else [])]
    with ray_cluster(ray, out, needed, workers) as mapper, progress_bar() as progress:
        manifest, skipped = run(inputs, out, options, workers or available_cores(), progress, mapper)
    if skipped:
        typer.echo(f"{plain(out)}: nothing changed since the last run (same inputs, options and version); skipped")
    else:
        console().print(render_summary(manifest))
    if not is_our_card(out / CARD):
        typer.echo(f"{plain(out / CARD)}: not, or no longer, the card that preprocess writes; left as it is", err=True)
    if manifest["quarantined"]:
        where = f"{manifest['quarantined']} quarantined, each with a line in {out / QUARANTINE}"
        with contextlib.suppress(OSError, ValueError), (out / QUARANTINE).open(encoding="utf-8") as lines:
            where += f"; the first: {json.loads(next(lines, ''))['message']}"  # unless somebody has removed it
        typer.echo(plain(where), err=True)
    return int(manifest["status"])


@app.command(epilog="Example: prospect-dst inspect labels --clip train:0")
def inspect(
    folder: Annotated[Path, Argument(help="an output folder of preprocess")],
    clip: Annotated[str | None, Option(help="show one clip's timeline: its id, number, or part of an id")] = None,
    html: Annotated[Path | None, Option(help="write one self-contained page with many timelines")] = None,
) -> int:
    """Show what the labels look like: a summary, one clip's timeline, or a page of timelines."""
    from pipeline import timeline, viewer
    from pipeline.dataset import verify
    from pipeline.summary import render_summary
    from pipeline.terminal import console, plain

    manifest = verify(folder)
    if clip is not None:
        console().print(timeline.Timeline(*timeline.find_clip(folder, clip)))
    elif html is None:
        console().print(render_summary(manifest))
    if html is not None:
        viewer.write_page(html, f"{folder.resolve().name} - labels", viewer.labels_page(folder, manifest))
        typer.echo(f"wrote {plain(html)} ({html.stat().st_size / 1000:,.0f} kB)")
    return 0


@app.command(epilog="Example: prospect-dst synth raw --train 40 --val 8 --test 8")
def synth(
    out: Annotated[Path, Argument(help="new folder for {split}_training.json and frames/*.arrow")],
    train: Annotated[int, Option(help="recordings in the train split", min=0)] = 190,
    val: Annotated[int, Option(help="recordings in the val split", min=0)] = 15,
    test: Annotated[int, Option(help="recordings in the test split", min=0)] = 15,
    views: Annotated[int, Option(help="camera views per recording", min=1)] = 2,
    difficulty: Annotated[float, Option(help="of reading the pictures: 0 easy .. 1 hard", min=0, max=1)] = 0.25,
    tells: Annotated[str, Option(help=TELLS_HELP)] = "vision",
    px: Annotated[int, Option(help="side of the square frames, pixels", min=32, max=1024)] = 64,
    seed: Annotated[int, Option(help="same seed, same bytes", min=0)] = 0,
) -> int:
    """Make task videos with conversations, in the file formats that users have."""
    from pipeline.synth import SynthConfig, parse_tells
    from pipeline.synth import synth as run
    from pipeline.terminal import command

    counts = {split: n for split, n in {"train": train, "val": val, "test": test}.items() if n}
    if not counts:
        raise UsageError("--train, --val and --test are all 0: nothing to make")
    config = SynthConfig(counts, views, difficulty=difficulty, tells=parse_tells(tells), px=px, seed=seed)
    for split, clips in run(out, config).items():
        typer.echo(f"{split:5} {counts[split]} recordings, {counts[split] * views} videos, {clips} clips")
    typer.echo(f"next: {command('preprocess', out, '--out', 'DATA', '--frames-root', out)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; every failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    message, status = "stopped; nothing half-written is left", 130
    try:
        result = app(argv, prog_name="prospect-dst", standalone_mode=False)
        if result != 130:  # typer's word for Ctrl-C
            return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        pass
    except UsageError as error:
        message, status = f"{error}; see --help", 2
    except InputError as error:
        message, status = str(error), 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        wrong_path = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        hint = "check the path" if wrong_path else "check space and permissions, then run again"
        message, status = f"{where}{error.strerror or error}; {hint}", 1
    except Exception as error:
        name = type(error).__name__  # of typer's own parser, or a bug of ours
        if name == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):
            message, status = f"{error.format_message()}; see --help", 2
        elif name != "Abort":
            if os.environ.get("PROSPECT_DST_TRACEBACK"):
                raise
            message, status = f"unexpected {name}: {error}; this is a bug: PROSPECT_DST_TRACEBACK=1 shows where", 1
    from pipeline.terminal import plain

    print(f"prospect-dst: {plain(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
