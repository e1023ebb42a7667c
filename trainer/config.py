"""Every knob of a training run, written once: a frozen dataclass, checked when made, saved with the weights.

A wrong combination fails here, before a model is built, and says which two fields disagree. Defaults are for
`model="tiny"` (1M parameters, random): both heads are learnt in 200 steps on two CPU cores. For a pretrained
SmolVLM start from lr 2e-5 and freeze_vision.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pipeline.errors import InputError
from trainer.arms import find_arm

RANDOM_MODELS = ("tiny", "nano")  # built from a config, with random weights and a tokenizer of the data's own texts
BALANCES = ("none", "mean")
PARTS = ("vision", "connector", "text", "heads")  # vision: the tower; text: body, embeddings and LM head
ABOVE_ZERO = (
    *("steps", "clips_per_step", "lr", "grad_clip"),
    *("tokens_per_frame", "max_tokens", "micro_batch_tokens", "lora_alpha"),
)
NOT_NEGATIVE = ("seed", "warmup_steps", "weight_decay", "w_speak", "w_dst", "w_lm", "eval_every", "lora_rank")


@dataclass(frozen=True)
class TrainConfig:
    """What a run is a function of, together with its data: a resume with another value is refused.

    Raises InputError where fields disagree.
    """

    arm: str = "speak+dst"  # what it reads of the state and where it decides: a name in arms.ARMS
    model: str = "tiny"  # in RANDOM_MODELS, a folder with a SmolVLM, or its name on the hub
    seed: int = 0  # of the weights, the order of clips and nothing else (draws have their own, per clip)
    steps: int = 200  # optimizer steps
    clips_per_step: int = 16  # over all ranks together
    lr: float = 2e-3  # peak
    lr_by_part: dict[str, float] = field(default_factory=dict)  # peak of a part in PARTS, instead of lr
    warmup_steps: int = 40  # linear from 0; cosine to 0 afterwards
    weight_decay: float = 0.01  # on matrices; never on biases and norms
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0  # largest gradient norm; the real one is in metrics.jsonl
    w_speak: float = 1.0
    w_dst: float = 1.0
    w_lm: float = 1.0
    balance: str = "none"  # 'mean': positives and negatives weigh equally, whatever their number
    reweigh: bool = False  # drawn negatives weigh 1 / neg_rate, which undoes the sampling's bias
    tokens_per_frame: int = 1  # k, a square number
    max_tokens: int = 2048  # of one window: prompt + frames * k + texts
    micro_batch_tokens: int = 4096  # of one forward pass, none of them padding; a longer window goes alone
    freeze: tuple[str, ...] = ()  # parts that do not learn
    lora_rank: int = 0  # above 0: the text body learns by adapters of this rank alone (needs peft)
    lora_alpha: int = 16  # adapters are scaled by lora_alpha / lora_rank
    bf16: bool | None = (
        None  # autocast of tower, connector and body; weights, heads, losses stay float32. None: on CUDA
    )
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile of the text body's layers
    eval_split: str = "val"
    eval_every: int = 0  # steps between evaluations; 0: only after the last step

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has no tuples
        object.__setattr__(self, "freeze", tuple(self.freeze))
        find_arm(self.arm)
        for name, value in self.to_json().items():
            _require(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}, expected a number")
        _require(self.seed < 2**63, f"seed is {self.seed}, expected below 2**63")
        for name in ABOVE_ZERO:
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected above 0")
        for name in NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or above")
        _require(self.balance in BALANCES, f"balance is {self.balance!r}, expected one of {', '.join(BALANCES)}")
        _require(
            self.w_speak + self.w_dst + self.w_lm > 0,
            "w_speak, w_dst and w_lm are all 0: nothing to learn from",
        )
        _require(
            self.warmup_steps <= self.steps,
            f"warmup_steps {self.warmup_steps} > steps {self.steps}; lower it or train longer",
        )
        _require(
            math.isqrt(self.tokens_per_frame) ** 2 == self.tokens_per_frame,
            f"tokens_per_frame is {self.tokens_per_frame}, expected a square number such as 1, 4, 9 or 16",
        )

        self._check_parts()

    def _check_parts(self) -> None:
        for name in ("freeze", "lr_by_part"):
            unknown = sorted(set(getattr(self, name)) - set(PARTS))
            _require(not unknown, f"{name} names {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
        _require("heads" not in self.freeze, "freeze names heads, which start at nothing; leave them out")
        for part, lr in self.lr_by_part.items():
            _require(part not in self.freeze, f"{part} is in lr_by_part and in freeze; drop one of them")
            _require(0 < lr < math.inf, f"lr_by_part {part} is {lr}, expected above 0; to stop a part use freeze")
        _require(
            not (self.lora_rank and "text" in self.freeze),
            f"lora_rank is {self.lora_rank} and text is in freeze: the adapters are the text's; drop one of them",
        )

    def on(self, device_type: str) -> TrainConfig:
        """With `bf16` decided for 'cuda' or 'cpu': what a run there is a function of."""
        return self if self.bf16 is not None else replace(self, bf16=device_type == "cuda")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The config written by `to_json`; InputError on a name or a value that this version does not know."""
        unknown = sorted(set(values) - {known.name for known in fields(cls)})
        _require(not unknown, f"unknown {', '.join(unknown)}; written by another version of prospect-dst")
        try:
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"training config: {error}; written by another version of prospect-dst") from None

    def differences(self, other: TrainConfig) -> list[str]:
        """'lr is 0.002, the run has 0.001' for each field in which `other`, the run's, differs."""
        return [
            f"{name} is {mine!r}, the run has {theirs!r}"
            for name, mine in self.to_json().items()
            if mine != (theirs := other.to_json()[name])
        ]


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Never changes what comes out of it, so a resume may choose anew."""

    workers: int | None = None  # processes that make packs ahead; 0: the training process; None: loader.default_workers
    save_every: int = 100  # steps between checkpoints in RUN/last; 0: only after the last step
    fsdp: bool = False  # several ranks: shard weights and optimizer instead of copying them
    logger: str | None = None  # 'wandb' or 'trackio', beside metrics.jsonl and TensorBoard
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("workers", "save_every"):
            _require((getattr(self, name) or 0) >= 0, f"{name} is {getattr(self, name)}, expected 0 or above")


@dataclass(frozen=True)
class Settings:
    """What counts as in time when events are matched. All in seconds but `bins`, those of the reliability curve."""

    early_s: float = 2.0  # a prediction may come this much before its reference
    late_s: float = 4.0
    refractory_s: float = 2.0  # from one prediction to the next
    reactive_s: float = 2.0  # an event this soon after the user spoke is a reaction
    bins: int = 10

    def __post_init__(self) -> None:
        for name in ("early_s", "late_s", "refractory_s", "reactive_s"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{name} is {value}, expected seconds, 0 or above")
        _require(self.bins > 0, f"bins is {self.bins}, expected above 0")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"training config: {message}")
