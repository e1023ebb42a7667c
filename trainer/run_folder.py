"""Where a run starts: from nothing, or from RUN/last, and what it refuses to go on with.

RUN/options.json says what the run is a function of (options, data, where frames come from); it is written when all
that can be checked beforehand is checked, just before the first step, and compared at every resume.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.storage import LOCK, is_vacant, lock, make_folder, write_json
from trainer.arms import find_arm
from trainer.checkpoint import load_run, recover, verify_model
from trainer.config import RANDOM_MODELS, TrainConfig
from trainer.features import kept_layer
from trainer.model import DecisionHeads, ProspectModel, load_model, model_folder
from trainer.tokenizer import Tokens, load_tokens, train_tiny_tokens

START = "options.json"
SOURCES = ("train data", "evaluation data", "frames")  # of options.json, beside the config


# ---- what a run is of --------------------------------------------------------------------------------


def options_of(config: TrainConfig, split: Split, held_out: Split | None, features: Path | None) -> dict[str, Any]:
    """The content of options.json. InputError where what cached features were made by is to learn."""
    if features is not None and "vision" not in config.freeze:
        raise InputError(f"{features}: features are of a tower that does not learn; add --freeze vision")
    after_connector = features is not None and kept_layer(features) == "connector"
    if after_connector and "connector" not in config.freeze:
        raise InputError(
            f"{features}: features are of a connector that does not learn; add --freeze vision,connector, or run "
            f"prospect-dst encode --keep vision into another folder"
        )
    return {
        "config": config.to_json(),
        "train data": split.key,
        "evaluation data": held_out.key if held_out else None,
        "frames": "pixels" if features is None else "connector's features" if after_connector else "features",
    }


def check_folder(run: Path, begun: dict[str, Any], resume: bool, held: ExitStack) -> None:
    """Refuse to write into something else, over a run, or on with a run that was begun otherwise.

    A run that stopped before its first checkpoint may be begun anew. `held` gets the folder's lock.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: not a folder; choose another --run")
    if not run.exists() or is_vacant(run):
        return
    take_lock(run, held)
    recover(run / "last")
    recover(run / "best")
    saved = (run / "last").exists() or (run / "best").exists()
    if not resume and (saved or not (run / START).is_file()):
        raise InputError(f"{run}: exists and is not empty; choose a new folder, or go on with --resume")
    if not (run / START).is_file():
        raise InputError(f"{run / START}: not found, so this is no run that could go on; choose another --run")
    if resume:
        _refuse_changes(run / START, read_start(run), begun)


def write_start(run: Path, begun: dict[str, Any], held: ExitStack) -> None:
    """Write RUN/options.json whole, or leave what is there; `held` gets the folder's lock, in place of an older one.

    It tries out what checkpoints need, so that a file system which refuses it is named before the first step.
    """
    make_folder(run)
    held.close()
    take_lock(run, held)
    write_json(run / START, begun)


def take_lock(run: Path, held: ExitStack) -> None:
    """Keep other processes out of the folder until `held` is closed, or this process ends, however it does."""
    taken = InputError(f"{run}: another process is at work there; wait for it, or choose another folder")
    held.enter_context(lock(run / LOCK, taken))


def read_start(run: Path) -> dict[str, Any]:
    """What RUN/options.json says, as `options_of` made it."""
    path = run / START
    try:
        begun = json.loads(path.read_bytes())
        _ = TrainConfig.from_json(begun["config"]), [begun[name] for name in SOURCES]
    except (ValueError, KeyError, TypeError) as error:
        hint = "damaged, or written by another version; train again into a new folder"
        raise InputError(f"{path}: not a run's options ({error!r}): {hint}") from None
    return dict(begun)


def start_config(run: Path, values: dict[str, Any], chosen: Collection[str], resume: bool = False) -> TrainConfig:
    """The config from `values`; a resumed run keeps its own, but for the fields `chosen`, which must agree with it.

    A warm-up that was not chosen is cut to the number of steps.
    """
    if resume and (run / START).is_file():
        kept = read_start(run)["config"]
        return TrainConfig.from_json(kept | {name: values[name] for name in chosen})
    steps = min(TrainConfig.warmup_steps, values["steps"])
    return TrainConfig(**values | ({} if "warmup_steps" in chosen else {"warmup_steps": steps}))


def _refuse_changes(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    changed = TrainConfig.from_json(now["config"]).differences(TrainConfig.from_json(was["config"]))
    found = [f"{name}: {now[name]}, the run has {was[name]}" for name in SOURCES if now[name] != was[name]]
    changed = [*found, *changed]
    if changed:
        raise InputError(f"{path}: {'; '.join(changed)}; resume with the same, or train into a new folder")


# ---- the model -------------------------------------------------------------------------------------


@dataclass
class Setup:
    """A model, and how far it is."""

    model: ProspectModel
    tokens: Tokens
    info: dict[str, Any]  # what a checkpoint says of the data
    done: int = 0  # steps
    best: float = -1.0  # mean AP on the evaluation split


def fresh(split: Split, config: TrainConfig) -> Setup:
    """A new model, its head biases at the log-odds that the loss sees, and what a checkpoint says of the data."""
    known = config.model not in RANDOM_MODELS
    verify_model(config.model)
    tokens = load_tokens(model_folder(config.model)) if known else train_tiny_tokens(split.texts())
    statistics = split.statistics()
    rates = statistics.positive_rates()
    seen = statistics.positive_rates(of_all=True) if config.reweigh else rates
    vlm = load_model(config.model, len(tokens), config.seed)
    longest = int(vlm.config.text_config.max_position_embeddings)
    if config.max_tokens > longest:
        raise InputError(f"max_tokens is {config.max_tokens}, but {config.model} reads {longest}; lower --max-tokens")
    heads = DecisionHeads(int(vlm.config.text_config.hidden_size), (0.5, 0.5) if config.balance == "mean" else seen)
    if find_arm(config.arm).decides == "inverted":
        heads.speak.bias.data.neg_()
    info = {
        "data_key": split.key,
        "labels": _label_counts(statistics.counts),
        "positive_rates": rates,
        "neg_rate": statistics.neg_rate,
        "fps": next(split.in_order()).fps,
    }
    return Setup(ProspectModel(vlm, heads, config, tokens.end), tokens, info)


def _label_counts(counts: Any) -> dict[str, dict[str, int]]:
    """Statistics.counts [2, 3] with names."""
    names = ("negative", "positive", "not_sampled")
    return {
        head: dict(zip(names, map(int, row), strict=True))
        for head, row in zip(("speaking", "dst_update"), counts, strict=True)
    }


def resumed(run: Path) -> Setup:
    """RUN/last as it was left; its optimizer is `load_state`'s."""
    loaded = load_run(run / "last", to_train=True)
    info = dict(loaded.info)
    return Setup(loaded.model, loaded.tokens, info, done=info.pop("step"), best=info.pop("best"))
