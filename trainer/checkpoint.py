"""A checkpoint, RUN/last or RUN/best: a folder that `transformers` opens, plus our heads.

    model.safetensors, config.json   the SmolVLM, by save_pretrained, LoRA adapters merged in
    heads.safetensors                both heads
    tokenizer.json, ...              the tokenizer
    run.json                         TrainConfig, step, label statistics, key of the data, SHA-256 of each file
    state.safetensors                `last` alone: the optimizer's moments and the random generators' states
    README.md                        the model card

Written to a folder beside its place, run.json last; then moved there file by file, run.json last: whenever a process is
killed, the old or the new checkpoint is complete, or `recover` completes the move. Logits are bit-equal after loading
(with LoRA to float rounding, as merging rounds once; a resume keeps the adapters apart, bit for bit).
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pipeline.errors import InputError
from pipeline.storage import LOCK, lock, move, naming, sha256, sync, write_json
from trainer.arms import find_arm
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.hub import model_folder
from trainer.model import DecisionHeads, ProspectModel, load_model, merge_adapters
from trainer.tokenizer import Tokens, load_tokens

FORMAT = 2
HEADS, RUN_INFO, STATE, CARD = "heads.safetensors", "run.json", "state.safetensors", "README.md"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter; Muon no squares
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; other ranks take part and get nothing


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A model and where it comes from (`info`: steps done, best AP, label statistics, the data's key), which training
    updates. `load_run` gives it ready to score."""

    model: ProspectModel
    tokens: Tokens
    config: TrainConfig
    info: dict[str, Any]

    @property
    def logit_correction(self) -> float | None:
        """To add to a logit before it is read as a probability: ln(neg_rate), or 0 where the loss was reweighed.

        Exact only where no silent frame was kept because the other head is positive there (DESIGN.md, Loss). None with
        `balance="mean"`, which shifts logits otherwise: calibrate on held-out clips.
        """
        if self.config.balance == "mean":
            return None
        return 0.0 if self.config.reweigh else math.log(max(self.info.get("neg_rate", 1.0), 2**-32))


# ---- writing -----------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, run: LoadedRun, optimizer: torch.optim.Optimizer | None = None, world: World | None = None
) -> None:
    """Write `folder`, or replace it; with `optimizer` training can go on from it. Collective."""
    model, world = run.model, world or World()
    weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    state: dict[str, Tensor] = {}  # what the next step depends on beside the merged weights
    if optimizer is not None:
        moments: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE) if optimizer.state else {}
        state = {f"{key}/{name}": v for name, kept in moments.get("state", {}).items() for key, v in kept.items()}
        if run.config.lora_rank:
            learns = {name for name, p in model.named_parameters() if p.requires_grad}
            state |= {f"parameter/{name}": value for name, value in weights.items() if name in learns}
        if torch.cuda.is_available():
            state["rng/cuda"] = torch.cuda.get_rng_state()
        state["rng/cpu"] = torch.get_rng_state()
    if world.is_main:
        new = _draft(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with naming(new):
            try:
                _write_files(new, run, weights, state)
            except SafetensorError as error:  # a full disk among others
                raise OSError(None, str(error), str(new)) from None
        _move_into_place(new, folder)
    world.wait()


def _write_files(new: Path, run: LoadedRun, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """All files of a checkpoint, each of them on disk when run.json is written."""
    parts: dict[str, dict[str, Tensor]] = {"vlm": {}, "heads": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.contiguous()
    vlm = run.model.vlm
    for config in (vlm.config.text_config, vlm.config.vision_config):
        config.dtype = vlm.dtype  # config.json is the same after a resume
    vlm.save_pretrained(new, state_dict=merge_adapters(vlm, parts["vlm"]))
    save_file(parts["heads"], new / HEADS)
    if state:
        save_file(state, new / STATE)
    for origin in ("is_local", "local_files_only"):
        run.tokens.tokenizer.init_kwargs.pop(origin, None)
    run.tokens.save(new)
    (new / CARD).write_text(model_card(run), encoding="utf-8")
    files = {}
    for path in sorted(p for p in new.rglob("*") if p.is_file() and p.name != CARD):
        with suppress(OSError):  # refused on some disks
            shutil.copymode(new / CARD, path)  # safetensors makes files that nobody else may read
        sync(path)
        files[path.relative_to(new).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(new / RUN_INFO, {"format": FORMAT, "config": run.config.to_json(), **run.info, "files": files})


def _draft(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _move_into_place(new: Path, folder: Path) -> None:
    """Move the files of `new`, run.json last: while it is there, `recover` finds that there is more to move."""
    folder.mkdir(exist_ok=True)
    for path in sorted(new.rglob("*"), key=lambda path: path.name == RUN_INFO):
        if path.is_file():
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            move(path, target)
    sync(folder)
    shutil.rmtree(new)


def recover(folder: Path) -> None:
    """Complete the move of a new checkpoint that a kill interrupted; remove one that is half-written."""
    new = _draft(folder)
    if (new / RUN_INFO).is_file():
        _move_into_place(new, folder)
    shutil.rmtree(new, ignore_errors=True)


def model_card(run: LoadedRun) -> str:
    """Markdown: what the model is, what its scores mean, how to load it."""
    config, info = run.config, run.info
    labels = [(counts["positive"], counts["negative"]) for counts in info.get("labels", {}).values()]
    shares = [f"{pos / (pos + neg):.4f}" if pos + neg else "none was supervised" for pos, neg in labels]
    to_probability = {
        None: "Both classes weighed equally: a sigmoid is no probability until it is calibrated on held-out clips.",
        0.0: "A sigmoid may be read as a probability.",
    }.get(run.logit_correction)
    return f"""---
library_name: transformers
tags: [smolvlm, dialog-state-tracking, when-to-speak]
---
# When should the assistant speak?

A SmolVLM (from `{config.model}`) with two linear heads, {info.get("step", "?")} of {config.steps} steps of
prospect-dst train. Both heads read the last of the {config.tokens_per_frame} token(s) of a frame.
A logit above 0 says: the assistant speaks, or the task's state changes, at this frame.
Arm `{config.arm}`: {find_arm(config.arm).description}.

    import trainer
    run = trainer.load("this folder")
    for clip in run.score("labels", "test"): print(clip.clip.clip_id, clip.logits.shape)

`SmolVLMForConditionalGeneration.from_pretrained` loads the body alone; the heads are in `{HEADS}`.

| of the training labels | speaking | DST update |
|---|---|---|
| positive, among supervised frames | {" | ".join(shares)} |

Silent frames were sampled at rate {info.get("neg_rate", 1.0):g} (mean over clips).
{to_probability or f"To read a sigmoid as a probability, first add {run.logit_correction:.4f} to the logit."}
Scores are with the reference's texts in the context, unless you feed it its own.
"""


# ---- reading -----------------------------------------------------------------------------------------


def load_run(run: Path, to_train: bool = False) -> LoadedRun:
    """The checkpoint in `run` (a run folder: its `last`; or one checkpoint), in eval mode, on the CPU.

    InputError where there is none, or one that is damaged, incomplete or of another format. `to_train`: as it was in
    training, LoRA adapters apart from the weights that they adapt.
    """
    folder = _checkpoint_folder(run)
    info = read_info(folder)
    _verify(folder, info.pop("files"), to_train)
    config = TrainConfig.from_json(info.pop("config"))
    tokens = load_tokens(folder.resolve())
    adapted = to_train and config.lora_rank
    vlm = load_model(config.model if adapted else str(folder.resolve()), len(tokens), config.seed)
    heads = DecisionHeads(int(vlm.config.text_config.hidden_size))
    heads.load_state_dict(load_file(folder / HEADS))
    kept = config if to_train else replace(config, lora_rank=0, compile=False, checkpointing=False)
    model = ProspectModel(vlm, heads, kept, tokens.choices)
    if adapted:
        state = load_file(folder / STATE).items()
        learnt = {name.removeprefix("parameter/"): v for name, v in state if name.startswith("parameter/")}
        model.load_state_dict(learnt, strict=False)
        merged = merge_adapters(vlm, vlm.state_dict())
        for name, value in ((n, v) for file in folder.glob("model*.safetensors") for n, v in load_file(file).items()):
            if not torch.allclose(merged[name], value, atol=1e-5):
                raise InputError(
                    f"{config.model}: {name} is not what the adapters were trained on; get that model back"
                )
    return LoadedRun(model.eval(), tokens, config, info)


def load_state(folder: Path, model: ProspectModel, optimizer: torch.optim.Optimizer) -> None:
    """Give a new `optimizer` and the random generators the state that `save_checkpoint` wrote. Collective."""
    saved = load_file(folder / STATE)
    moments: dict[str, dict[str, Tensor]] = {}  # by parameter
    for key, _, name in (key.partition("/") for key in saved):
        if key in _MOMENTS:
            moments.setdefault(name, {})[key] = saved[f"{key}/{name}"]
    if moments:
        state: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer), "state": moments}  # its own groups
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    torch.set_rng_state(saved["rng/cpu"])
    if "rng/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng/cuda"])


def read_info(folder: Path) -> dict[str, Any]:
    """run.json, its config and files still as JSON."""
    path = folder / RUN_INFO
    if not path.is_file():
        best = f"; {folder / 'best'} is one" if (folder / "best" / RUN_INFO).is_file() else ""
        raise InputError(f"{path}: not found, expected a run of prospect-dst train; run train first{best}")
    try:
        info = dict(json.loads(path.read_bytes()))
        version = info.pop("format")
        if version == FORMAT:  # KeyError, TypeError: damaged
            _ = info["config"], [file["sha256"] for file in info["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); train again") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, expected {FORMAT}; use the version that wrote it")
    return info


def verify_model(name: str) -> None:
    """InputError where `name` is a run or a checkpoint of ours with a damaged file; any other model passes."""
    folder = Path(model_folder(name))
    if (folder / RUN_INFO).is_file():
        _verify(folder, read_info(folder)["files"], to_train=False)


def run_hash(run: Path) -> str:
    """The SHA-256 that names a checkpoint: that of run.json, which holds every other file's."""
    folder = _checkpoint_folder(run)
    read_info(folder)  # refuses what is none
    return sha256(folder / RUN_INFO)


def _checkpoint_folder(run: Path) -> Path:
    """RUN/last, or `run` itself; what a kill interrupted there is completed first."""
    folder = run / "last" if (run / "last").is_dir() or _draft(run / "last").is_dir() else run
    if (_draft(folder) / RUN_INFO).is_file():
        with lock(folder.parent / LOCK, InputError(f"{folder}: is being written just now; try again")):
            recover(folder)
    return folder


def _verify(folder: Path, files: dict[str, dict[str, Any]], to_train: bool) -> None:
    """InputError where a file is missing or is not, byte for byte, what was written; STATE only if it is needed."""
    if to_train and STATE not in files:
        raise InputError(f"{folder}: holds no {STATE}, so training can't go on from it; resume from RUN/last")
    for name, expected in files.items():
        if name == STATE and not to_train:
            continue
        path = folder / name
        found = sha256(path) if path.is_file() else None
        if found != expected["sha256"]:
            what = "damaged, its SHA-256 differs" if found else "not found"
            raise InputError(f"{path}: {what}; train again, or get the whole folder again")
