"""A run's folder: its checkpoints, RUN/last and RUN/best, and RUN/options.json, what the run is a function of.

A checkpoint is a folder that `transformers` opens, plus our heads:

    model.safetensors, config.json   the SmolVLM, by save_pretrained, LoRA adapters merged in
    heads.safetensors                both heads
    tokenizer.json, ...              the tokenizer
    run.json                         TrainConfig, step, label statistics, fps, SHA-256 of each file
    state.safetensors                `last` alone: the optimizer's moments and the random generators' states
    README.md                        the model card

It is written beside its place, then moved there file by file (buckets rename no folders), run.json last both times:
whenever a process is killed, the old one is complete, or the next `load_run` or resume completes the new one. Logits
are bit-equal after loading (with LoRA to float rounding; a resume keeps the adapters apart, bit for bit). options.json
is written just before the first step; every resume is compared with it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS as HEAD_NAMES
from pipeline.storage import LOCK, is_vacant, lock, make_folder, move, sha256, sync, write_json
from trainer.arms import find_arm
from trainer.config import RANDOM_MODELS, TrainConfig
from trainer.distributed import World
from trainer.features import kept_layer
from trainer.hub import model_folder
from trainer.model import DecisionHeads, ProspectModel, load_model, merge_adapters
from trainer.tokenizer import Tokens, load_tokens, train_tiny_tokens

FORMAT = 2
HEADS, RUN_INFO, STATE, CARD = "heads.safetensors", "run.json", "state.safetensors", "README.md"
OPTIONS = "options.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter; Muon no squares
# On rank 0; other ranks take part and get nothing.
_WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A model and what training updates of it (`info`: step, best mean AP, labels, neg_rate, fps)."""

    model: ProspectModel
    tokens: Tokens
    config: TrainConfig
    info: dict[str, Any]

    @property
    def logit_correction(self) -> float | None:
        """To add to a logit before it is read as a probability: ln(neg_rate), or 0 where the loss was reweighed; None
        with `balance="mean"`. Exact but where a silent frame is kept because it is positive for the other head."""
        if self.config.balance == "mean":
            return None
        return 0.0 if self.config.reweigh else math.log(max(self.info.get("neg_rate", 1.0), 2**-32))


# ---- writing a checkpoint ----------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, run: LoadedRun, optimizer: torch.optim.Optimizer | None = None, world: World | None = None
) -> None:
    """Write `folder`, or replace it; with `optimizer` training can go on from it. Collective."""
    model, world = run.model, world or World()
    weights: dict[str, Any] = states.get_model_state_dict(model, options=_WHOLE)
    state: dict[str, Tensor] = {}  # what the next step depends on beside the merged weights
    if optimizer is not None:
        moments: Any = states.get_optimizer_state_dict(model, optimizer, options=_WHOLE) if optimizer.state else {}
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
        try:
            _write_files(new, run, weights, state)
        except SafetensorError as error:  # a full disk among others
            raise OSError(None, str(error), str(new)) from None
        _move_into_place(new, folder)
    world.gather(None)  # no rank goes on before it is there


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
    run.tokens.tokenizer.save_pretrained(new)
    (new / CARD).write_text(model_card(run), encoding="utf-8")
    files = {}
    for path in sorted(p for p in new.rglob("*") if p.is_file() and p.name != CARD):
        with suppress(OSError):  # refused on some disks
            shutil.copymode(new / CARD, path)  # safetensors makes files that nobody else may read
        sync(path)
        files[path.relative_to(new).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(new / RUN_INFO, {"format": FORMAT, "config": asdict(run.config), **run.info, "files": files})


def _draft(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.new"


def _move_into_place(new: Path, folder: Path) -> None:
    """Move the files, run.json last: while `new` has it, `recover` knows that there is more to move."""
    folder.mkdir(exist_ok=True)
    for path in sorted(new.rglob("*"), key=lambda path: path.name == RUN_INFO):
        if path.is_file():
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            move(path, target)
    sync(folder)
    shutil.rmtree(new)


def recover(folder: Path) -> None:
    """After a kill: complete the move of a new checkpoint, or remove one that is half-written."""
    new = _draft(folder)
    if (new / RUN_INFO).is_file():
        _move_into_place(new, folder)
    shutil.rmtree(new, ignore_errors=True)


def model_card(run: LoadedRun) -> str:
    """Markdown: what the model is, what its scores mean, how to load it."""
    config, info, correction = run.config, run.info, run.logit_correction
    labels = [(head, n["positive"], n["negative"]) for head, n in info.get("labels", {}).items()]
    shares = ", ".join(f"{head} {positive / max(1, positive + negative):.4f}" for head, positive, negative in labels)
    how = "calibrate it on held-out clips" if correction is None else f"add {correction:.4f} to the logit first"
    return f"""---
library_name: transformers
tags: [smolvlm, dialog-state-tracking, when-to-speak]
---
A SmolVLM (from `{config.model}`) with two heads on the last token of a frame (`{HEADS}`); {info.get("step", "?")} of
{config.steps} steps of prospect-dst train, arm `{config.arm}`: {find_arm(config.arm).description}.
A logit above 0 says: the assistant speaks, or the task's state changes, at this frame.

    import trainer
    run = trainer.load("this folder")
    for clip in run.score("labels", "test"): print(clip.clip.clip_id, clip.logits.shape)

Positive among the supervised labels of training: {shares or "not known"}.
Silent frames were sampled at rate {info.get("neg_rate", 1.0):g} (mean over clips).
To read a logit's sigmoid as a probability, {how}.
Scores are with the reference's texts in the context, unless you feed it its own.
"""


# ---- reading a checkpoint ----------------------------------------------------------------------------


def load_run(run: Path, to_train: bool = False) -> LoadedRun:
    """The checkpoint in `run` (a run folder: its `last`; or one checkpoint), in eval mode, on the CPU.

    InputError where there is none, or one that is damaged, incomplete or of another format. `to_train`: as it was in
    training, LoRA adapters apart from the weights that they adapt.
    """
    folder = _checkpoint_folder(run)
    info = _verified_info(folder, to_train)
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
                problem = f"{name} is not what the adapters were trained on; get that model back"
                raise InputError(f"{config.model}: {problem}")
    return LoadedRun(model.eval(), tokens, config, info)


def load_state(folder: Path, model: ProspectModel, optimizer: torch.optim.Optimizer) -> None:
    """Give a new `optimizer` and the random generators the state that `save_checkpoint` wrote. Collective."""
    saved = load_file(folder / STATE)
    moments: dict[str, dict[str, Tensor]] = {}  # by parameter
    for key, _, name in (key.partition("/") for key in saved):
        if key in _MOMENTS:
            moments.setdefault(name, {})[key] = saved[f"{key}/{name}"]
    if moments:
        own_groups = states.get_optimizer_state_dict(model, optimizer)
        state: dict[str, Any] = {**own_groups, "state": moments}
        states.set_optimizer_state_dict(model, optimizer, state, options=states.StateDictOptions(full_state_dict=True))
    torch.set_rng_state(saved["rng/cpu"])
    if "rng/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng/cuda"])


def verify_model(name: str) -> None:
    """InputError where `name` is a run or a checkpoint of ours with a damaged file; any other model passes."""
    folder = _checkpoint_folder(Path(name))
    if (folder / RUN_INFO).is_file():
        _verified_info(folder)


def run_hash(run: Path) -> str:
    """The SHA-256 that names a checkpoint: that of run.json, which holds every other file's."""
    return sha256(_checkpoint_folder(run) / RUN_INFO)


def _checkpoint_folder(run: Path) -> Path:
    """RUN/last, or `run` itself; a move that a kill interrupted is completed first."""
    for folder in (run / "last", run):
        if (_draft(folder) / RUN_INFO).is_file():
            with lock(folder.parent / LOCK, InputError(f"{folder}: is being written just now; try again")):
                recover(folder)
    return Path(model_folder(str(run)))


def _verified_info(folder: Path, to_train: bool = False) -> dict[str, Any]:
    """run.json but for `files`, which must be there, byte for byte as they were written; STATE only `to_train`."""
    path = folder / RUN_INFO
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a run of prospect-dst train; run train first")
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())
        version, files, _ = info.pop("format"), info.pop("files"), info["config"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: damaged; train again, or get the whole folder again") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, expected {FORMAT}; use the version that wrote it")
    if to_train and STATE not in files:
        raise InputError(f"{folder}: holds no {STATE}, so training can't go on from it; resume from RUN/last")
    for name, expected in files.items():
        path = folder / name
        if (to_train or name != STATE) and not (path.is_file() and sha256(path) == expected["sha256"]):
            problem = "damaged, its SHA-256 differs" if path.is_file() else "not found"
            raise InputError(f"{path}: {problem}; train again, or get the whole folder again")
    return info


# ---- the run: its options, its start -----------------------------------------------------------------


def run_options(config: TrainConfig, split: Split, held_out: Split | None, features: Path | None) -> dict[str, Any]:
    """The content of options.json. InputError where a part is to be trained whose output is cached in `features`."""
    frames = "pixels"
    if features is not None:
        after = kept_layer(features) == "connector"
        frames, frozen = ("connector's features", "vision,connector") if after else ("features", "vision")
        if not set(frozen.split(",")) <= set(config.freeze):
            raise InputError(f"{features}: these features are for frozen parts; add --freeze {frozen}")
    keys = {"train data": split.key, "evaluation data": held_out.key if held_out else None}
    return {"config": asdict(config), **keys, "frames": frames}


def check_folder(run: Path, options: dict[str, Any], resume: bool, held: ExitStack) -> None:
    """Lock the folder if it exists (until `held` is closed), restore its checkpoints; InputError for what this run
    can't go on from. One that stopped before its first checkpoint may be started anew, with any options."""
    if is_vacant(run):
        return
    lock_folder(run, held)
    for name in ("last", "best"):
        recover(run / name)
    saved = any((run / name).exists() for name in ("last", "best"))
    if not (run / OPTIONS).is_file() or (saved and not resume):
        raise InputError(f"{run}: exists and is not empty; choose a new folder, or go on with a run by --resume")
    if (run / "last").exists():
        check_resume(run, options)


def check_resume(run: Path, options: dict[str, Any]) -> None:
    """InputError that names what the run was started with and `options` has otherwise."""
    before, now = ({**each, **each["config"], "config": None} for each in (read_options(run), options))
    changed = [f"{name} is {now[name]!r}, the run has {before[name]!r}" for name in now if now[name] != before[name]]
    if changed:
        asked = {"pixels": "leave --features out"}.get(before["frames"], "give --features again")
        hint = f"resume with the same{f' ({asked})' * (now['frames'] != before['frames'])}, or train into a new folder"
        raise InputError(f"{run / OPTIONS}: {'; '.join(changed)}; {hint}")


def write_options(run: Path, options: dict[str, Any], model: ProspectModel, held: ExitStack) -> None:
    """Make and lock the folder, and write RUN/options.json: a file system that can't take a run is found out here.
    InputError where it has no room for a checkpoint of the `model` in training."""
    make_folder(run)
    held.close()
    lock_folder(run, held)
    write_json(run / OPTIONS, options)
    needed = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())  # with two moments
    if 0 < (free := shutil.disk_usage(run).free) < needed:  # 0: some buckets do not know
        raise InputError(f"{run}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB are needed; make room")


def lock_folder(run: Path, held: ExitStack) -> None:
    """Keep other processes out until `held` is closed or this process ends; InputError where one is in."""
    taken = InputError(f"{run}: another process is at work there; wait for it, or choose another folder")
    held.enter_context(lock(run / LOCK, taken))


def read_options(run: Path) -> dict[str, Any]:
    """RUN/options.json, as `run_options` made it, its config with today's defaults."""
    try:
        options: dict[str, Any] = json.loads((run / OPTIONS).read_bytes())
        return options | {"config": asdict(TrainConfig.from_json(options["config"]))}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"damaged, or of another version ({error!r})"
        raise InputError(f"{run / OPTIONS}: {problem}; train into a new folder") from None


def resolve_config(run: Path, values: dict[str, Any], chosen: Collection[str], resume: bool = False) -> TrainConfig:
    """The config of `values`, an unchosen warm-up cut to the steps; a resumed run's own but for the `chosen` fields."""
    if resume and (run / OPTIONS).is_file():
        return TrainConfig.from_json(read_options(run)["config"] | {name: values[name] for name in chosen})
    if "warmup_steps" not in chosen:
        values = values | {"warmup_steps": min(TrainConfig.warmup_steps, values["steps"])}
    return TrainConfig(**values)


def start_run(run: Path, split: Split, config: TrainConfig, resume: bool) -> LoadedRun:
    """RUN/last as it was left (its optimizer is `load_state`'s), or a new model, whose heads' biases start at the
    log-odds of the positives that the loss sees."""
    if resume and (run / "last").is_dir():
        return load_run(run / "last", to_train=True)
    verify_model(config.model)
    torch.manual_seed(config.seed)  # its state is saved, also of a pretrained model
    random = config.model in RANDOM_MODELS
    tokens = train_tiny_tokens(split.texts()) if random else load_tokens(model_folder(config.model))
    vlm = load_model(config.model, len(tokens), config.seed)
    text = vlm.config.text_config
    if config.max_tokens > (longest := text.max_position_embeddings):
        raise InputError(f"max_tokens is {config.max_tokens}, but {config.model} reads {longest}; lower --max-tokens")
    statistics = split.statistics()
    rates = (0.5, 0.5) if config.balance == "mean" else statistics.positive_rates(of_all=config.reweigh)
    heads = DecisionHeads(int(text.hidden_size), rates)
    if find_arm(config.arm).decides == "inverted":
        heads.speak.bias.data.neg_()
    kinds, counts = ("negative", "positive", "not_sampled"), zip(HEAD_NAMES, statistics.counts.tolist(), strict=True)
    info = {
        "step": 0,
        "best": -1.0,  # mean AP on the evaluation split
        "labels": {head: dict(zip(kinds, row, strict=True)) for head, row in counts},
        "neg_rate": statistics.neg_rate,
        "fps": next(split.in_order()).fps,
    }
    return LoadedRun(ProspectModel(vlm, heads, config, tokens.choices), tokens, config, info)
