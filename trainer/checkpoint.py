"""A run on disk: RUN/last and RUN/best, each a folder that `transformers` can open, plus our heads.

    model.safetensors, config.json   the SmolVLM, by save_pretrained
    heads.safetensors                both heads; a folder without them is refused, never filled with random ones
    tokenizer.json, ...              the tokenizer
    run.json                         TrainConfig, step, the data's key, positive rates and neg_rate of `train`

No pickle. A checkpoint is written beside its place and renamed into it: killed at any point, the old one or the
new one is complete (between the two renames the old one is called RUN/.last.old). Save and load give bit-equal
logits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.tokenizer import Tokens, load_tokens

FORMAT = 1
HEADS, RUN_INFO = "heads.safetensors", "run.json"


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A model that is ready to score, and where it comes from (`info`: step, data_key, rates)."""

    model: ProspectModel
    tokens: Tokens
    config: TrainConfig
    info: dict[str, Any]


def save_checkpoint(
    folder: Path, model: ProspectModel, tokens: Tokens, config: TrainConfig, info: dict[str, Any]
) -> None:
    """Write `folder` whole; one that is there is replaced."""
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    model.vlm.save_pretrained(new)
    save_file({name: value.contiguous() for name, value in model.heads.state_dict().items()}, new / HEADS)
    tokens.save(new)
    content = {"format": FORMAT, "config": config.to_json(), **info}
    (new / RUN_INFO).write_text(json.dumps(content, indent=1) + "\n")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_run(run: Path) -> LoadedRun:
    """The checkpoint in `run` (a run folder: its `last`; or one checkpoint), in eval mode, on the CPU.

    Raises TrainerError where there is none, or one that is incomplete or of another format.
    """
    folder = run / "last" if (run / "last").is_dir() else run
    info = _read_info(folder)
    config = TrainConfig.from_json(info.pop("config"))
    tokens = load_tokens(folder.resolve())
    vlm = load_model(str(folder.resolve()), len(tokens))
    heads = DecisionHeads(int(vlm.config.text_config.hidden_size))
    heads.load_state_dict(_read_heads(folder, heads))
    model = ProspectModel(vlm, heads, config.tokens_per_frame, config.freeze_vision)
    return LoadedRun(model.eval(), tokens, config, info)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / RUN_INFO
    if not path.is_file():
        raise TrainerError(f"{path}: not found, expected a run of prospect-dst train; run train first")
    try:
        info = json.loads(path.read_bytes())
        found = info.pop("format")
        info["config"] = dict(info["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path}: not a run's description ({error!r}); train again") from None
    if found != FORMAT:
        raise TrainerError(f"{path}: format {found}, expected {FORMAT}; use the version that wrote it")
    return dict(info)


def _read_heads(folder: Path, like: DecisionHeads) -> dict[str, Any]:
    path = folder / HEADS
    if not path.is_file():
        raise TrainerError(f"{path}: not found, and heads are never made up; train again, or get the whole folder")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise TrainerError(f"{path}: damaged ({error}); train again, or get the file again") from None
    found, expected = ({name: list(v.shape) for name, v in s.items()} for s in (state, like.state_dict()))
    if found != expected:
        raise TrainerError(f"{path}: holds {found}, expected {expected}; get the whole folder again")
    return state
