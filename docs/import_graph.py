"""Draws docs/imports.svg from the code: each module below all that import it (`just import-graph`)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDERS = ("pipeline.readers", "trainer.evaluation", "trainer.live")  # one node each
COLOURS = {"pipeline": "#d97b16", "trainer": "#2c6fd1"}


def read() -> dict[str, set[str]]:
    """module -> the modules of ours that it imports, lazily or not."""
    graph = grimp.build_graph("pipeline", "trainer", exclude_type_checking_imports=True)
    for folder in FOLDERS:
        graph.squash_module(folder)
    modules = graph.modules - {"pipeline", "trainer"}
    return {module: graph.find_modules_directly_imported_by(module) & modules - {module} for module in modules}


def heights(imports: dict[str, set[str]]) -> dict[str, int]:
    """The longest chain of imports from a module down; RecursionError where there is a circle."""
    known: dict[str, int] = {}

    def height(module: str) -> int:
        if module not in known:
            known[module] = 1 + max(map(height, imports[module]), default=-1)
        return known[module]

    return {module: height(module) for module in imports}


def places(imports: dict[str, set[str]], rows: dict[str, int]) -> dict[str, tuple[float, float]]:
    """x in 0..1 and row of each module; a row is ordered by where what it imports stands, pipeline to the left."""
    by_row = defaultdict(list)
    for module, row in rows.items():
        by_row[row].append(module)
    x: dict[str, float] = {}
    for row in sorted(by_row):
        below = {m: [x[i] for i in imports[m]] for m in by_row[row]}
        order = sorted(by_row[row], key=lambda m: (m.startswith("trainer"), sum(below[m]) / max(len(below[m]), 1), m))
        x |= {module: (i + 0.5) / len(order) for i, module in enumerate(order)}
    return {module: (x[module], rows[module]) for module in imports}


def draw(out: Path) -> None:
    imports = read()
    at = places(imports, heights(imports))
    plt.rcParams |= {"svg.hashsalt": "imports", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(13, 10))
    for module, below in sorted(imports.items()):
        for other in sorted(below - {"pipeline.errors"}):  # which nearly all import
            axes.annotate(
                "", at[other], at[module], arrowprops={"arrowstyle": "-|>", "color": "#8b95a1", "alpha": 0.3, "lw": 0.7}
            )
    for module, (x, y) in sorted(at.items()):
        package, _, name = module.partition(".")
        box = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": COLOURS[package]}
        label = f"{name}/" if module in FOLDERS else name
        axes.text(x, y, label, ha="center", va="center", fontsize=9, bbox=box)
    axes.set_title("Imports: trainer (blue) -> pipeline (orange); every arrow points down", fontsize=11)
    axes.set(xlim=(0, 1), ylim=(-0.5, max(y for _, y in at.values()) + 0.5))
    axes.set_axis_off()
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("imports.svg"))
