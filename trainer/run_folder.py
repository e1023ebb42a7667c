"""The run folder: its lock, what the run is a function of (RUN/options.json), and the resume check.

options.json is written when all that can be checked beforehand has been, just before the first step; every resume is
compared with it (`check_resume`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import LOCK, is_vacant, lock, make_folder, write_json
from trainer.arms import find_arm
from trainer.checkpoint import LoadedRun, load_run, recover, verify_model
from trainer.config import RANDOM_MODELS, TrainConfig
from trainer.features import kept_layer
from trainer.hub import model_folder
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.tokenizer import load_tokens, train_tiny_tokens

OPTIONS = "options.json"
SOURCES = ("train data", "evaluation data", "frames")  # of options.json, beside the config


def run_options(config: TrainConfig, split: Split, held_out: Split | None, features: Path | None) -> dict[str, Any]:
    """The content of options.json. InputError where a part is to be trained whose output is cached in `features`."""
    layer = "none" if features is None else kept_layer(features)
    frames, frozen = {
        "none": ("pixels", ()),
        "vision": ("features", ("vision",)),
        "connector": ("connector's features", ("vision", "connector")),
    }[layer]
    if not set(frozen) <= set(config.freeze):
        other = ", or run prospect-dst encode --keep vision into another folder" if layer == "connector" else ""
        raise InputError(f"{features}: these features are for frozen parts; add --freeze {','.join(frozen)}{other}")
    sources = (split.key, held_out.key if held_out else None, frames)
    return {"config": config.to_json(), **dict(zip(SOURCES, sources, strict=True))}


def check_folder(run: Path, options: dict[str, Any], resume: bool, held: ExitStack) -> None:
    """Lock the folder if it exists (until `held` is closed), restore its checkpoints, refuse what this run can't use.

    InputError for files of somebody else, a run without `resume`, and a run of other options. A run that stopped
    before its first checkpoint may be started anew, with any options.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: not a folder; choose another --run")
    if is_vacant(run):
        return
    lock_folder(run, held)
    for name in ("last", "best"):
        recover(run / name)
    started = (run / OPTIONS).is_file()
    if not resume and (not started or any((run / name).exists() for name in ("last", "best"))):
        raise InputError(f"{run}: exists and is not empty; choose a new folder, or go on with --resume")
    if resume and ((run / "last").exists() or not started):
        check_resume(run, options)


def check_resume(run: Path, options: dict[str, Any]) -> None:
    """InputError that names what the run was started with and `options` has otherwise."""
    before = read_options(run)
    config, changed = before["config"], []
    changed += [
        f"{name}: {options[name]}, the run has {before[name]}" for name in SOURCES if options[name] != before[name]
    ]
    changed += [
        f"{name} is {value!r}, the run has {config[name]!r}"
        for name, value in options["config"].items()
        if value != config[name]
    ]
    if changed:
        raise InputError(f"{run / OPTIONS}: {'; '.join(changed)}; resume with the same, or train into a new folder")


def write_options(run: Path, options: dict[str, Any], held: ExitStack) -> None:
    """Make and lock the folder, and write RUN/options.json: a file system that can't take a run is found out here."""
    make_folder(run)
    held.close()
    lock_folder(run, held)
    write_json(run / OPTIONS, options)


def lock_folder(run: Path, held: ExitStack) -> None:
    """Keep other processes out until `held` is closed or this process ends; InputError where one is in."""
    taken = InputError(f"{run}: another process is at work there; wait for it, or choose another folder")
    held.enter_context(lock(run / LOCK, taken))


def read_options(run: Path) -> dict[str, Any]:
    """RUN/options.json, as `run_options` made it."""
    path = run / OPTIONS
    if not path.is_file():
        raise InputError(f"{path}: not found, so this is no run that could go on; choose another --run")
    try:
        options = json.loads(path.read_bytes())
        config = TrainConfig.from_json(options["config"]).to_json()
        return {"config": config, **{name: options[name] for name in SOURCES}}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, or of another version ({error!r}); train into a new folder") from None


def resolve_config(run: Path, values: dict[str, Any], chosen: Collection[str], resume: bool = False) -> TrainConfig:
    """The config of `values`; a resumed run keeps its own but for the fields that were `chosen`.

    A warm-up that was not chosen is cut to the number of steps.
    """
    if resume and (run / OPTIONS).is_file():
        return TrainConfig.from_json(read_options(run)["config"] | {name: values[name] for name in chosen})
    if "warmup_steps" not in chosen:
        values = values | {"warmup_steps": min(TrainConfig.warmup_steps, values["steps"])}
    return TrainConfig(**values)


def start_run(run: Path, split: Split, config: TrainConfig, resume: bool) -> LoadedRun:
    """RUN/last as it was left (its optimizer is `checkpoint.load_state`'s); a new model where there is none.

    The biases of new heads start at the log-odds of the positives that the loss sees.
    """
    if resume and (run / "last").is_dir():
        return load_run(run / "last", to_train=True)
    verify_model(config.model)
    random = config.model in RANDOM_MODELS
    tokens = train_tiny_tokens(split.texts()) if random else load_tokens(model_folder(config.model))
    vlm = load_model(config.model, len(tokens), config.seed)
    text = vlm.config.text_config
    if config.max_tokens > text.max_position_embeddings:
        longest = text.max_position_embeddings
        raise InputError(f"max_tokens is {config.max_tokens}, but {config.model} reads {longest}; lower --max-tokens")
    statistics = split.statistics()
    rates = statistics.positive_rates(of_all=config.reweigh)
    heads = DecisionHeads(int(text.hidden_size), (0.5, 0.5) if config.balance == "mean" else rates)
    if find_arm(config.arm).decides == "inverted":
        heads.speak.bias.data.neg_()
    kinds = ("negative", "positive", "not_sampled")
    counts = zip(HEADS, statistics.counts.tolist(), strict=True)
    info = {
        "step": 0,
        "best": -1.0,  # mean AP on the evaluation split
        "data_key": split.key,
        "labels": {head: dict(zip(kinds, row, strict=True)) for head, row in counts},
        "positive_rates": statistics.positive_rates(),
        "neg_rate": statistics.neg_rate,
        "fps": next(split.in_order()).fps,
    }
    return LoadedRun(ProspectModel(vlm, heads, config, tokens.choices), tokens, config, info)
