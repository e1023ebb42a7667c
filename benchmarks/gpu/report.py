"""Rows of the GPU benchmark -> results.md: the machine, the goals, every row.

    python benchmarks/gpu/report.py ROWS.JSONL [ROWS.JSONL ...]     writes results.md beside this file

A part is that of the last run that began it. Refused: rows of a smoke run, or of a machine without a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEAD = "# GPU results\n\n"
BEST = ("graphs", "graphs, compile")


def _used(rows: dict[tuple[str, str], Row], part: str, budget: int) -> float | None:
    found = [row["used"] for kind in BEST if "used" in (row := rows.get((part, f"{kind}, packs of {budget}"), {}))]
    return max(found, default=None)


def _value(part: str, name: str, key: str) -> Callable[[dict[tuple[str, str], Row]], float | None]:
    return lambda rows: rows.get((part, name), {}).get(key)


GOALS: list[tuple[str, Callable[[dict[tuple[str, str], Row]], Any], Callable[[Any], bool], str]] = [
    ("all tests marked gpu pass", _value("tests", "marked gpu", "which_failed"), lambda v: v == [], "failed: {}"),
    ("packed = unpacked, float32", _value("parity", "packed against unpacked, float32", "ok"), bool, "{}"),
    ("packed = unpacked, bf16", _value("parity", "packed against unpacked, bf16", "ok"), bool, "{}"),
    ("a resumed run goes on where it was", _value("parity", "resumed after 2 of 4 steps", "ok"), bool, "{}"),
    ("256M: a step uses at least 25%", lambda r: _used(r, "step-256M", 16384), lambda v: v >= 0.25, "{:.1%}"),
    ("2.2B: a step uses at least 40%", lambda r: _used(r, "step-2.2B", 8192), lambda v: v >= 0.40, "{:.1%}"),
    ("HF Trainer, length-grouped: at least 1.5x faster", _value("hf", "ratio", "ours_is_faster_by"),
     lambda v: v >= 1.5, "{:.2f}x"),
    ("256M: encode uses at least 50%", _value("encode", "256M, as encode does", "used"), lambda v: v >= 0.5, "{:.1%}"),
    ("2.2B: encode uses at least 50%", _value("encode", "2.2B, as encode does", "used"), lambda v: v >= 0.5, "{:.1%}"),
    ("256M live: at least 100 decisions/s", _value("live", "256M, graph", "decisions_per_s"),
     lambda v: v >= 100, "{:.1f}"),
    ("2.2B live: at least 25 decisions/s", _value("live", "2.2B, graph", "decisions_per_s"),
     lambda v: v >= 25, "{:.1f}"),
    ("memory of a stream is flat", _value("live", "256M, memory reserved by context", "growth_mb"),
     lambda v: v == 0, "{:+.1f} MB"),
    ("end to end at 256M", _value("e2e", "took", "ended"), lambda v: v == "done", "{}"),
]  # fmt: skip


def made_of(runs: Sequence[Sequence[Row]]) -> str:
    """The report of these runs' rows."""
    rows, commits = dict[tuple[str, str], Row](), dict[str, str]()
    for run in runs:
        commit = next((row["commit"] for row in run if row["name"] == "machine"), "unknown")
        idle = {row["part"] for row in run if str(row.get("ended")).startswith("not begun")}
        began = {row["part"]: commit for row in run if row["part"] not in idle}
        rows = {key: row for key, row in rows.items() if key[0] not in began}
        rows |= {(row["part"], row["name"]): row for row in run if row["part"] in began}
        commits |= began
    machines = [row for run in runs for row in run if (row["part"], row["name"]) == ("env", "machine")]
    lines = [HEAD]
    for machine in {json.dumps(row): row for row in machines}.values():
        if machine["smoke"] or machine["device"] != "cuda":
            lines.append("**A smoke run, or no GPU: no number here means anything.**\n\n")
        kept = {key: value for key, value in machine.items() if key not in ("part", "name")}
        lines.append("- " + ", ".join(f"{key} {_shown(value)}" for key, value in kept.items()) + "\n")
    lines += ["\n| goal | found | |\n|---|---|---|\n"]
    for claim, find, met, shown in GOALS:
        value = find(rows)
        cells = ("not run", "") if value is None else (shown.format(value), "met" if met(value) else "**NOT met**")
        lines.append(f"| {claim} | {' | '.join(cells)} |\n")
    for part in dict.fromkeys(part for part, _ in rows if part != "env"):
        lines.append(f"\n## {part}\n\nCommit {commits[part]}.\n\n| row | |\n|---|---|\n")
        for (_, name), row in ((key, row) for key, row in rows.items() if key[0] == part):
            values = {key: value for key, value in row.items() if key not in ("part", "name")}
            lines.append(f"| {name} | {', '.join(f'{key} {_shown(value)}' for key, value in values.items())} |\n")
    return "".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(_shown, value)) or "none" if isinstance(value, list) else str(value).replace("|", "/")


def main() -> None:
    runs = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in sys.argv[1:]]
    for run, path in zip(runs, sys.argv[1:], strict=True):
        if not any(row.get("device") == "cuda" and not row["smoke"] for row in run):
            sys.exit(f"{path}: not of a full run on a GPU, so no report is made of it")
    if not runs:
        sys.exit(__doc__)
    Path(__file__).with_name("results.md").write_text(made_of(runs))


if __name__ == "__main__":
    main()
