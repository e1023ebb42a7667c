"""AdamW, and Muon for matrices: the optimizers of `--optimizer`.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) makes all singular values of a matrix's momentum about 1,
so that rare directions learn as fast as common ones. Its Newton-Schulz iteration runs in float32 here, over all
matrices of one shape at once: in bfloat16, as in torch.optim.Muon, it doubles the time of a step on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.model import ProspectModel, part_of

MOMENTUM: Final = 0.95
MATRIX_LR: Final = 5.0  # times the others' learning rate
_RMS: Final = 0.2  # of an update, as AdamW's are (Liu et al. 2025, "Muon is scalable for LLM training")
_QUINTIC: Final = (3.4445, -4.7750, 2.0315)  # Jordan's: five rounds bring singular values to 0.7 .. 1.2


def make_optimizer(model: ProspectModel, config: TrainConfig) -> torch.optim.AdamW:
    """A group per part and kind, each with its peak rate (`peak`); no decay on biases and norms."""
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_muon = config.optimizer == "muon" and is_hidden_matrix(name, parameter)
            groups.setdefault((part_of(name), parameter.ndim >= 2, by_muon), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "peak": config.lr_by_part.get(part, config.lr) * (MATRIX_LR if by_muon else 1.0),
            **({"muon": True} if by_muon else {}),
        }
        for (part, decays, by_muon), parameters in groups.items()
    ]
    kind = MuonAdamW if config.optimizer == "muon" else torch.optim.AdamW
    return kind(settings, lr=config.lr, betas=config.betas, fused=True)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may have it: a matrix between hidden states, no embedding, LM head or decision head."""
    return parameter.ndim == 2 and part_of(name) != "heads" and "embed" not in name and "lm_head" not in name


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for groups with `muon`; its momentum is kept as `exp_avg`, as AdamW's is."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step(closure)
        self.param_groups = groups
        for group in (group for group in groups if group.get("muon")):
            self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            for new in (parameter for parameter in parameters if not self.state[parameter]):  # AdamW looks for a step
                self.state[new] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(new)}
            momentum = [self.state[parameter]["exp_avg"] for parameter in parameters]
            gradients: list[Any] = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momentum, MOMENTUM))  # Nesterov's
            updates = orthogonalised(ahead) * (group["lr"] * _RMS * math.sqrt(max(shape)))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, list(updates.unbind()))


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """[n, rows, columns] with all singular values near 1, singular vectors kept."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
