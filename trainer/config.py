"""Every knob of a training run, written once: dataclass fields with their help, which are the command line's options.

Defaults are for `--model tiny` (1M parameters, random): both heads are learnt in 200 steps on two CPU cores. For a
pretrained SmolVLM start from lr 2e-5 and freeze the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from typer import Option

from pipeline.errors import InputError
from pipeline.schema import HEADS
from trainer.arms import ARMS, find_arm

RANDOM_MODELS = ("tiny", "nano")  # built from a config, with random weights and a tokenizer of the data's own texts
BALANCES = ("none", "mean")
OPTIMIZERS = ("adamw", "muon")
# evaluation with the reference's texts in the context, or with the model's own
TEACHER_FORCED, FREE_RUNNING = MODES = ("teacher-forced", "free-running")
PARTS = ("vision", "connector", "text", "heads")  # vision: the tower; text: body, embeddings and LM head
_ABOVE_ZERO = {
    *("steps", "clips_per_step", "lr", "grad_clip"),
    *("tokens_per_frame", "max_tokens", "micro_batch_tokens", "lora_alpha"),
}
_PANELS = ("Model", "Optimizer", "Loss", "Speed and memory", "Evaluation while training")
_model, _optim, _loss, _speed, _evaluation = (partial(Option, rich_help_panel=panel) for panel in _PANELS)
_events = partial(Option, rich_help_panel="Matching of events", min=0)


@dataclass(frozen=True)
class TrainConfig:
    """What a run is a function of, together with its data. Raises InputError where fields disagree."""

    arm: Annotated[str, _model(help=f"what it reads of the state: {', '.join(ARMS)}")] = "speak+dst"
    model: Annotated[str, _model(help="tiny or nano (random), a folder, a run, or a name on the hub")] = "tiny"
    seed: Annotated[int, _model(help="of weights and order")] = 0  # draws have a seed of their own, per clip
    steps: Annotated[int, _optim(help="optimizer steps")] = 200
    clips_per_step: Annotated[int, _optim(help="clips in one optimizer step, over all ranks")] = 16
    optimizer: Annotated[str, _optim(help=f"of hidden matrices: {' or '.join(OPTIMIZERS)}; AdamW elsewhere")] = "adamw"
    lr: Annotated[float, _optim(help="peak learning rate; muon's matrices learn at 5 times as much")] = 2e-3
    lr_by_part: Annotated[
        dict[str, float], _optim(help=f"another peak for a part: heads=1e-3,connector=1e-4 ({', '.join(PARTS)})")
    ] = field(default_factory=dict)
    warmup_steps: Annotated[
        int, _optim(help="linear, then cosine to 0; default: 40, or all steps", show_default=False)
    ] = 40
    weight_decay: Annotated[float, _optim(help="on matrices; never on biases and norms")] = 0.01
    betas: tuple[float, float] = (0.9, 0.98)  # no option of the command line
    grad_clip: Annotated[float, _optim(help="largest gradient norm")] = 1.0
    w_speak: Annotated[float, _loss(help="weight of the speaking head's loss")] = 1.0
    w_dst: Annotated[float, _loss(help="weight of the DST head's loss")] = 1.0
    w_lm: Annotated[float, _loss(help="weight of the text's loss")] = 1.0
    balance: Annotated[str, _loss(help="none, or mean: both classes weigh equally")] = "none"
    reweigh: Annotated[bool, _loss("--reweigh", help="drawn negatives weigh 1 / rate: no sampling bias")] = False
    tokens_per_frame: Annotated[int, _model(help="tokens of a frame, a square number")] = 1
    max_tokens: Annotated[int, _model(help="longest window; longer clips are cut")] = 2048
    micro_batch_tokens: Annotated[int, _speed(help="tokens of one forward pass: memory against speed")] = 4096
    freeze: Annotated[tuple[str, ...], _model(help="parts that do not learn: vision,connector,text")] = ()
    lora_rank: Annotated[int, _model(help="above 0: the text learns by adapters (peft)")] = 0
    lora_alpha: Annotated[int, _model(help="adapters are scaled by alpha / rank")] = 16
    bf16: Annotated[
        bool | None,
        _speed(
            help="autocast to bfloat16; default: on a GPU. Without it attention there takes no flash kernel: an "
            "estimated 3 times the time of a step",
            show_default=False,
        ),
    ] = None
    checkpointing: Annotated[bool, _speed("--checkpointing", help="recompute activations: slower, less memory")] = False
    compile: Annotated[bool, _speed("--compile", help="torch.compile the text layers")] = False
    eval_split: Annotated[str, _evaluation(help="split to evaluate on")] = "val"
    eval_every: Annotated[int, _evaluation(help="steps between evaluations; 0: at the end")] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has no tuples
        object.__setattr__(self, "freeze", tuple(self.freeze))
        find_arm(self.arm)
        for name, value in asdict(self).items():
            if isinstance(value, int | float):
                fits = math.isfinite(value) and (value > 0 if name in _ABOVE_ZERO else value >= 0)
                bound = "above 0" if name in _ABOVE_ZERO else "0 or above"
                _require(fits, f"{name} is {value}, expected a number, {bound}")
        for name, value, known in (("balance", self.balance, BALANCES), ("optimizer", self.optimizer, OPTIMIZERS)):
            _require(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name, chosen, parts in (("freeze", self.freeze, PARTS[:3]), ("lr_by_part", self.lr_by_part, PARTS)):
            unknown = sorted(set(chosen).difference(parts))
            _require(not unknown, f"{name} names {', '.join(unknown)}; expected some of {', '.join(parts)}")
        for part, lr in self.lr_by_part.items():
            _require(0 < lr < math.inf, f"lr_by_part {part} is {lr}, expected above 0; to stop a part use freeze")
        k, both = self.tokens_per_frame, ", ".join(set(self.freeze) & set(self.lr_by_part))
        adapts_nothing = self.lora_rank > 0 and "text" in self.freeze
        for wrong, message in (
            (self.warmup_steps > self.steps, f"warmup_steps {self.warmup_steps} > steps {self.steps}; lower it"),
            (math.isqrt(k) ** 2 != k, f"tokens_per_frame is {k}, expected a square number such as 1, 4, 9 or 16"),
            (both, f"{both} is in lr_by_part and in freeze; drop one of them"),
            (adapts_nothing, f"lora_rank is {self.lora_rank} and text is in freeze; drop one of them"),
        ):
            _require(not wrong, message)

    def on(self, device_type: str) -> TrainConfig:
        """With `bf16` decided for 'cuda' or 'cpu': what a run there is a function of."""
        return self if self.bf16 is not None else replace(self, bf16=device_type == "cuda")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Of what `asdict` gave, also through JSON; InputError on a name or a value that this version does not know."""
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"training config: {error}; written by another version of prospect-dst") from None


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Never changes its results, so a resume may choose anew. `progress` is no option."""

    workers: Annotated[
        int | None,
        Option(
            help="processes that read two steps ahead each, frames included; default: none on a CPU, one per core but "
            "one, at most 8, on a GPU. Changes no result",
            show_default=False,
            min=0,
        ),
    ] = None
    save_every: Annotated[int, Option(help="steps between checkpoints; 0: only the last", min=0)] = 100
    fsdp: Annotated[bool, Option("--fsdp", help="under torchrun: shard the model, not copy it")] = False
    logger: Annotated[str | None, Option("--log", help="also to wandb")] = None
    progress: bool = True


@dataclass(frozen=True)
class Settings:
    """How predicted events are matched with the reference's, in seconds. `reactive_s` and `bins` are no options."""

    early_s: Annotated[float, _events(help="seconds that an event may come too early")] = 2.0
    late_s: Annotated[float, _events(help="seconds that it may come too late")] = 4.0
    refractory_s: Annotated[float, _events(help="seconds of silence after an event")] = 2.0
    reactive_s: float = 2.0  # an event this soon after the user spoke is a reaction
    bins: int = 10  # of the reliability curve


def check_thresholds(given: Mapping[str, float]) -> None:
    """InputError unless each is a logit of a head."""
    for head, value in given.items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"training config: {message}")
