"""A run on disk: RUN/last and RUN/best, each a folder that `transformers` can open, plus our heads.

    model.safetensors, config.json   the SmolVLM, by save_pretrained (adapters of LoRA added in)
    heads.safetensors                both heads; a folder without them is refused, never filled with random ones
    tokenizer.json, ...              the tokenizer
    run.json                         TrainConfig, step, label statistics, the data's key, size and SHA-256 of each file
    state.safetensors                `last` alone: the optimizer's moments and the generators' states
    README.md                        the model card

No pickle. A checkpoint is written beside its place, synced to disk and renamed into it: killed at any point, the
old one or the new one is complete, and `recover` finds it. Save and load give bit-equal logits (with LoRA: to
float rounding, as adding the adapters in rounds once; a resume adds them up as before, bit for bit).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import InputError
from pipeline.storage import move, naming, sha256, sync, write_json
from trainer.arms import find_arm
from trainer.config import TrainConfig
from trainer.distributed import World, shard_like, whole
from trainer.model import DecisionHeads, ProspectModel, load_model, model_folder, plain_weights
from trainer.tokenizer import Tokens, load_tokens

if TYPE_CHECKING:
    from trainer.teacher_forced import ClipScores

FORMAT = 2
HEADS, RUN_INFO, STATE, CARD = "heads.safetensors", "run.json", "state.safetensors", "README.md"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A model that is ready to score, and where it comes from (`info`: step, label statistics, the data's key)."""

    model: ProspectModel
    tokens: Tokens
    config: TrainConfig
    info: dict[str, Any]

    @property
    def logit_correction(self) -> float | None:
        """To add to a logit before it is read as a probability: ln(neg_rate), or 0 where the loss made up for it.

        Exact only where no silent frame was kept because the other head is positive there (DESIGN.md, Loss). None with
        `balance="mean"`, which shifts logits otherwise: calibrate on held-out clips.
        """
        return _correction(self.config, self.info["neg_rate"])

    def score(self, data: str | Path, split: str = "test", frames_root: Path | None = None) -> Iterator[ClipScores]:
        """Each clip of a split of `data` with logits float32 [2, F] of speaking and DST for every frame."""
        from trainer.teacher_forced import score_run

        return score_run(self, Path(data), split, frames_root)


def _correction(config: TrainConfig, neg_rate: float) -> float | None:
    if config.balance == "mean":
        return None
    return 0.0 if config.reweigh else math.log(max(neg_rate, 2**-32))


# ---- writing -----------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: ProspectModel,
    tokens: Tokens,
    config: TrainConfig,
    info: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    world: World | None = None,
) -> None:
    """Write `folder` whole; one that is there is replaced. With `optimizer` training can go on from it. Collective."""
    world = world or World()
    weights = _collect(plain_weights(model.vlm), world)
    heads = _collect(model.heads.state_dict().items(), world)
    state = {} if optimizer is None else _collect(_state(model, optimizer, config), world)
    if world.is_main:
        new = _beside(folder, "new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with naming(new):
            _save_body(model, weights, new)
            _save(heads, new / HEADS)
            if optimizer is not None:
                _save(state, new / STATE)
            _save_tokens(tokens, new)
            (new / CARD).write_text(model_card(config, info), encoding="utf-8")
            content = {"format": FORMAT, "config": config.to_json(), **info, "files": _files(new)}
            write_json(new / RUN_INFO, content)  # the last: a folder with it is whole
        _move_into_place(new, folder)
    world.wait()


def _collect(tensors: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Whole, in the leading rank's memory; the others take part and keep nothing. Collective."""
    kept = {}
    for name, value in tensors:
        full = whole(value.detach())
        if world.is_main:
            kept[name] = full.cpu().contiguous()
    return kept


def _state(model: ProspectModel, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Iterator[tuple[str, Tensor]]:
    """All that the next step depends on beside the weights; with LoRA also what learns, as it is not in them."""
    yield "rng/cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "rng/cuda", torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and config.lora_rank:
            yield f"parameter/{name}", parameter
        kept = optimizer.state.get(parameter, {})
        yield from ((f"{key}/{name}", kept[key]) for key in MOMENTS if key in kept)


def _save_body(model: ProspectModel, weights: dict[str, Tensor], folder: Path) -> None:
    """The SmolVLM; its configuration says the same whether it was made here or loaded, as in a resumed run."""
    for part in (model.vlm.config.text_config, model.vlm.config.vision_config):
        part.dtype = model.vlm.dtype
    try:
        model.vlm.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:  # a full disk among others
        raise OSError(None, str(error), str(folder)) from None


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from None


def _save_tokens(tokens: Tokens, folder: Path) -> None:
    """The tokenizer, without where it was loaded from."""
    for told in ("is_local", "local_files_only"):
        tokens.tokenizer.init_kwargs.pop(told, None)
    tokens.save(folder)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each of them on disk when this returns; the card may be edited."""
    umask = os.umask(0)
    os.umask(umask)
    found, mode = {}, 0o666 & ~umask
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD):
        with suppress(OSError):  # not on every disk
            path.chmod(mode)  # safetensors' own is for the owner alone, whatever the umask
        sync(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _move_into_place(new: Path, folder: Path) -> None:
    """By two renames; where a folder cannot be renamed (buckets; SMB, while a file in it is open), file by file."""
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError:
        _refill(folder, new)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refill(folder: Path, new: Path) -> None:
    """Move the files of `new`; while the folder has no run.json, that of `new` says that there is more to move."""
    folder.mkdir(exist_ok=True)
    (folder / RUN_INFO).unlink(missing_ok=True)
    for path in sorted(new.rglob("*"), key=lambda path: path.name == RUN_INFO):
        if path.is_file():
            target = folder / path.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            move(path, target)
    shutil.rmtree(new)


def recover(folder: Path) -> None:
    """Put a checkpoint in its place if a kill came while it was moved there; clear what is half-written."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    if folder.exists() and not (folder / RUN_INFO).exists() and (new / RUN_INFO).exists():
        _refill(folder, new)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def model_card(config: TrainConfig, info: dict[str, Any]) -> str:
    """Markdown: what the model is, what its scores mean, how to load it."""
    rates = _card_rates(info.get("labels", {}))
    probability = _card_probability(_correction(config, info.get("neg_rate", 1.0)))
    return f"""---
library_name: transformers
tags: [smolvlm, dialog-state-tracking, when-to-speak]
---
# When should the assistant speak?

A SmolVLM (from `{config.model}`) with two linear heads, trained by prospect-dst for {info.get("step", "?")} of
{config.steps} steps. Both heads read the last of the {config.tokens_per_frame} token(s) of a frame. A logit above 0
says: the assistant speaks, or the task's state changes, at this frame. Arm `{config.arm}`:
{find_arm(config.arm).about}.

    import trainer
    run = trainer.load("this folder")
    for clip in run.score("labels", "test"): print(clip.clip.clip_id, clip.logits.shape)

`SmolVLMForConditionalGeneration.from_pretrained` loads the body alone; the heads are in `{HEADS}`.

| of the training labels | speaking | DST update |
|---|---|---|
| positive, among supervised frames | {rates} |

Silent frames were drawn at rate {info.get("neg_rate", 1.0):g} (mean over clips). {probability}
Scores are with the reference's texts in the context, unless you feed it its own.
"""


def _card_rates(labels: dict[str, dict[str, int]]) -> str:
    shares = []
    for head in ("speaking", "dst_update"):
        counts = labels.get(head, {})
        positive, negative = counts.get("positive", 0), counts.get("negative", 0)
        shares.append(f"{positive / (positive + negative):.4f}" if positive + negative else "none was supervised")
    return " | ".join(shares)


def _card_probability(correction: float | None) -> str:
    if correction is None:
        return "Both classes weighed equally: a sigmoid is no probability until it is calibrated on held-out clips."
    if correction == 0:
        return "A sigmoid may be read as a probability: the loss made up for the drawing."
    return (
        f"To read a sigmoid as a\nprobability, first add {correction:.4f} to the logit; that is exact only where no "
        "silent frame was kept because the\nother head is positive."
    )


# ---- reading -----------------------------------------------------------------------------------------


def load_run(run: Path, to_train: bool = False) -> LoadedRun:
    """The checkpoint in `run` (a run folder: its `last`; or one checkpoint), in eval mode, on the CPU.

    Raises InputError where there is none, or one that is damaged, incomplete or of another format. `to_train`: as
    it was in training, adapters apart from the weights they adapt.
    """
    folder = _folder(run)
    info = read_info(folder)
    _verify(folder, info.pop("files"), to_train)
    config = TrainConfig.from_json(info.pop("config"))
    tokens = load_tokens(folder.resolve())
    adapted = to_train and config.lora_rank
    vlm = load_model(config.model if adapted else str(folder.resolve()), len(tokens), config.seed)
    heads = DecisionHeads(int(vlm.config.text_config.hidden_size))
    heads.load_state_dict(_read_heads(folder, heads))
    kept = config if to_train else replace(config, lora_rank=0, compile=False, checkpointing=False)
    model = ProspectModel(vlm, heads, kept, tokens.end)
    if adapted:
        _load_parameters(folder, model, config.model)
    return LoadedRun(model.eval(), tokens, config, info)


def load_state(folder: Path, model: ProspectModel, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` and the random generators the state that `save_checkpoint` wrote."""
    state = _read_tensors(folder / STATE)
    for name, parameter in model.named_parameters():
        if f"exp_avg/{name}" in state:
            moments = {key: state[f"{key}/{name}"] for key in MOMENTS}
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else shard_like(value, parameter)
                for key, value in moments.items()
            }
    torch.set_rng_state(state["rng/cpu"])
    if "rng/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng/cuda"])


def verify_model(name: str) -> None:
    """InputError where `name` is a run or a checkpoint of ours with a damaged file; another model says nothing."""
    folder = Path(model_folder(name))
    if (folder / RUN_INFO).is_file():
        _verify(folder, read_info(folder)["files"], to_train=False)


def read_info(folder: Path) -> dict[str, Any]:
    """What run.json says, its config and files still as JSON."""
    path = folder / RUN_INFO
    if not path.is_file():
        best = f"; {folder / 'best'} is one" if (folder / "best" / RUN_INFO).is_file() else ""
        raise InputError(f"{path}: not found, expected a run of prospect-dst train; run train first{best}")
    try:
        info = json.loads(path.read_bytes())
        found = info.pop("format")
        if found != FORMAT:
            raise InputError(f"{path}: format {found}, expected {FORMAT}; use the version that wrote it")
        _ = dict(info["config"]), [(file["bytes"], file["sha256"]) for file in info["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a run's description ({error!r}); train again") from None
    return dict(info)


def run_hash(run: Path) -> str:
    """The SHA-256 that names a checkpoint: that of run.json, which holds every other file's."""
    folder = _folder(run)
    read_info(folder)  # refuses what is none
    return sha256(folder / RUN_INFO)


def _folder(run: Path) -> Path:
    last = run / "last"
    if last.is_dir():
        return last
    return _beside(last, "old") if _beside(last, "old").is_dir() else run


def _verify(folder: Path, files: dict[str, dict[str, Any]], to_train: bool) -> None:
    """Every file is there and is, byte for byte, what was written; the optimizer's only where it is needed."""
    if to_train and STATE not in files:
        raise InputError(f"{folder}: holds no {STATE}, so training can't go on from it; resume from RUN/last")
    for name, expected in files.items():
        if name == STATE and not to_train:
            continue
        path = folder / name
        if not path.is_file():
            made_up = ", and heads are never made up" if name == HEADS else ""
            raise InputError(f"{path}: not found{made_up}; train again, or get the whole folder")
        if sha256(path) != expected["sha256"]:
            size = f"{path.stat().st_size} bytes of {expected['bytes']}"
            raise InputError(f"{path}: damaged ({size}, SHA-256 differs); train again, or get the file again")


def _load_parameters(folder: Path, model: ProspectModel, base: str) -> None:
    state = _read_tensors(folder / STATE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[f"parameter/{name}"])
        merged = _read_tensors(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else {}
        for name, value in plain_weights(model.vlm):
            if name in merged and not torch.allclose(value, merged[name], atol=1e-5):
                raise InputError(f"{base}: {name} is not what the adapters were trained on; get that model back")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); train again, or get the file again") from None


def _read_heads(folder: Path, like: DecisionHeads) -> dict[str, Any]:
    path = folder / HEADS
    state = _read_tensors(path)
    found, expected = ({name: list(v.shape) for name, v in s.items()} for s in (state, like.state_dict()))
    if found != expected:
        raise InputError(f"{path}: holds {found}, expected {expected}; get the whole folder again")
    return state
