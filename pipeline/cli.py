"""The front door: every command on one page. It parses, calls a plain function, and alone makes exit statuses.

0 done; 1 bad input; 2 bad usage; 3 done, with clips quarantined. What a command needs is imported when it is
called, so that --help answers in a fifth of a second and the data commands run where torch is not installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import InputError, UsageError

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
    inputs: Annotated[list[Path], typer.Argument(help="JSON / JSON Lines files, or folders of {split}_*.json")],
    out: Annotated[Path, typer.Option(help="output folder; replaced whole, or left as it was")],
    positive: Annotated[str, typer.Option(help="span: every frame of an event; onset: its first alone")] = "span",
    neg_rate: Annotated[
        list[str] | None,
        typer.Option(help="share of silent frames to supervise: 0.3, or by split train=0.3,val=1"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling draws")] = 0,
    pad_s: Annotated[float, typer.Option(help="widen each clip by so many seconds on both sides")] = 0.0,
    split: Annotated[str | None, typer.Option(help="split of all inputs, instead of the file names'")] = None,
    workers: Annotated[int, typer.Option(help="processes; 0: one per core. Never changes a byte", min=0)] = 0,
    frames_root: Annotated[
        Path | None, typer.Option(help="check annotations against the frames (Arrow files) below this folder")
    ] = None,
    frame_convention: Annotated[
        str | None, typer.Option(help="event, window or lead-in, instead of finding out")
    ] = None,
    recording_regex: Annotated[
        str | None, typer.Option(help="what of a video_uid names the recording (first group, or whole match)")
    ] = None,
    on_error: Annotated[str, typer.Option(help="quarantine: set bad clips aside; fail: stop")] = "quarantine",
) -> int:
    """Turn conversations into Parquet shards of per-frame labels."""
    from pipeline.options import ASSEMBLY101, Options
    from pipeline.preprocess import preprocess as run
    from pipeline.terminal import progress_bar

    options = Options(
        seed=seed,
        positive=positive,
        neg_rate=_rates(neg_rate or []),
        pad_s=pad_s,
        split=split,
        frame_convention=frame_convention,
        recording_regex=ASSEMBLY101 if recording_regex is None else recording_regex,
        frames_root=None if frames_root is None else str(frames_root),
        on_error=on_error,
    )
    with progress_bar() as progress:
        manifest, skipped = run(inputs, out, options, workers or _cores(), progress)
    if skipped:
        typer.echo(f"{out}: nothing changed since the last run (same inputs, options and version); skipped")
    else:
        _show_summary(out, manifest)
    return int(manifest["status"])


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="an output folder of preprocess")],
    clip: Annotated[str | None, typer.Option(help="show one clip's timeline: its id, number, or part of an id")] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page with many timelines")] = None,
) -> int:
    """Look at shards: the summary, one clip's timeline, or a page of timelines."""
    from pipeline import inspect_html, shards, timeline
    from pipeline.terminal import console

    manifest = shards.verify(folder)
    if clip is not None:
        console().print(timeline.timeline(folder, clip))
    elif html is None:
        _show_summary(folder, manifest)
    if html is not None:
        inspect_html.write_page(folder, html)
        typer.echo(f"wrote {html} ({html.stat().st_size / 1000:,.0f} kB)")
    return 0


def _show_summary(folder: Path, manifest: dict[str, Any]) -> None:
    from pipeline import inspect as look
    from pipeline.terminal import console

    console().print(look.render_summary(look.summarise(folder), manifest))


def _rates(given: list[str]) -> dict[str, float]:
    """--neg-rate values as {split: rate}; '*' stands for every split not named."""
    rates: dict[str, float] = {}
    for item in ",".join(given).split(",") if given else []:
        split, _, number = item.rpartition("=")
        try:
            rates[split.strip() or "*"] = float(number)
        except ValueError:
            raise UsageError(f"--neg-rate {item!r}: expected a rate like 0.3, or train=0.3,val=1") from None
    return rates


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Every failure is one line on stderr."""
    try:
        status = app(argv if argv is not None else sys.argv[1:], prog_name="prospect-dst", standalone_mode=False)
    except UsageError as error:
        return _fail(f"{error}; see --help", 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing half-written is left", 130)
    except InputError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (parsed := _parser_status(error)) is not None:
            return parsed
        if type(error).__name__ == "TrainerError":
            return _fail(str(error), 1)
        if os.environ.get("PROSPECT_DST_TRACEBACK"):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"unexpected {message}; this is a bug: PROSPECT_DST_TRACEBACK=1 shows where", 1)
    return status if isinstance(status, int) else 0


def _parser_status(error: Exception) -> int | None:
    """Exit status of the command-line parser's own errors (typer's, or click's under older typers)."""
    name = type(error).__name__
    if name == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if name == "Abort":
        return _fail("stopped; nothing half-written is left", 130)
    if not hasattr(error, "format_message"):
        return None
    return _fail(f"{' '.join(error.format_message().split())}; see --help", 2)


def _fail(message: str, status: int) -> int:
    print(f"prospect-dst: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
