"""Every knob of a training run, written once: a frozen dataclass, checked when made, saved with the weights.

A wrong combination fails here, before a model is built, and says which two fields disagree. Defaults are for
`model="tiny"` (1M parameters, random): both heads are learnt in 200 steps on two CPU cores. For a pretrained
SmolVLM start from lr 2e-5 and freeze_vision.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.errors import TrainerError

BALANCES = ("none", "mean")
ABOVE_ZERO = (
    *("steps", "clips_per_step", "lr", "grad_clip"),
    *("tokens_per_frame", "max_tokens", "micro_batch_tokens"),
)
NOT_NEGATIVE = ("seed", "warmup_steps", "weight_decay", "w_speak", "w_dst", "w_lm", "eval_every")


@dataclass(frozen=True)
class TrainConfig:
    """What a run is a function of, together with its data. Raises TrainerError where fields disagree."""

    model: str = "tiny"  # 'tiny', a folder with a SmolVLM, or its name on the hub
    seed: int = 0  # of the weights, the order of clips and nothing else (draws have their own, per clip)
    steps: int = 200  # optimizer steps
    clips_per_step: int = 16
    lr: float = 2e-3  # peak
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
    micro_batch_tokens: int = 4096  # of one forward pass, with padding; a longer window goes alone. Memory only
    freeze_vision: bool = False  # neither vision tower nor connector learns
    eval_split: str = "val"
    eval_every: int = 0  # steps between evaluations; 0: only after the last step

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has no tuples
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The config written by `to_json`; TrainerError on a name that this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        _require(not unknown, f"unknown {', '.join(unknown)}; written by another version of prospect-dst")
        return cls(**values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TrainerError(f"training config: {message}")
