"""Loss terms as sums and counts, so that a step's loss does not depend on how it was cut into micro-batches.

    loss = w_speak * BCE_speak + w_dst * BCE_dst + w_lm * CE_text

each term being the sum over supervised positions divided by their number in the *whole* optimizer step.
The mean of micro-batch means is another number: 1.05 against 0.146 with 3 and 121 supervised frames. -100
is indexed out before the BCE, which does not know it. A sum over nothing is exactly 0 and still has a
graph; never NaN.

    N frames of a batch    T supervised text tokens    V vocabulary
    sums and counts are [5] (TERMS): per head negatives and positives, then text
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.schema import NOT_SAMPLED
from trainer.arms import Arm
from trainer.config import TrainConfig

TERMS = ("speak_neg", "speak_pos", "dst_neg", "dst_pos", "lm")


def label_weights(labels: Tensor, neg_rate: Tensor, reweigh: bool) -> Tensor:
    """float [2, N]: weight of each supervised label; 1, or 1 / neg_rate for a drawn negative if `reweigh`.

    A 0 is drawn unless the other head is positive there: then it was kept for certain.
    """
    weights = torch.ones_like(labels, dtype=neg_rate.dtype)
    if reweigh:
        drawn = (labels == 0) & (labels.flip(0) != 1)
        weights = torch.where(drawn, 1 / neg_rate.clamp(min=2**-32), weights)
    return weights


def targets(logits: Tensor, labels: Tensor, arm: Arm) -> tuple[Tensor, Tensor]:
    """(logits, labels), [2, N] each, as the arm's loss takes them from logits and labels that say *speak*.

    An inverted head's logit says silence, so that is what its labels say, too; -100 stays. Where there is no DST head,
    nothing is supervised for it.
    """
    speak, dst = labels
    if not arm.dst_head:
        dst = torch.full_like(dst, NOT_SAMPLED)
    if arm.decides == "inverted":
        speak = torch.where(speak >= 0, 1 - speak, speak)
        logits = torch.stack([-logits[0], logits[1]])
    return logits, torch.stack([speak, dst])


def masked_bce_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sums, counts), each [4]: weighted BCE and weight per head and class, over labels [2, N] of 0 or 1.

    `logits` [2, N] at other labels are never read: neither value nor gradient depends on them. BCE(x, y) and
    BCE(-x, 1 - y) are the same float, and their gradients each other's negative: an inverted head learns the same bits.
    """
    weights = torch.ones_like(logits) if weights is None else weights
    sums, counts = [], []
    for head in (0, 1):
        for value in (0, 1):
            chosen = labels[head] == value
            weight, logit = weights[head][chosen], logits[head][chosen]
            sums.append(-(F.logsigmoid(logit if value else -logit) * weight).sum())
            counts.append(weight.sum())
    return torch.stack(sums), torch.stack(counts)


def lm_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [T, V] with targets [T], summed; 0 with a graph where T is 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def combine(sums: Tensor, counts: Tensor, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its terms speak, dst, lm before their weights) from sums [5] over counts [5] of the whole step.

    Linear in `sums`: with the same counts, the losses of micro-batches add up to that of the step.
    """
    terms = {
        "speak": _head_mean(sums[0:2], counts[0:2], config.balance),
        "dst": _head_mean(sums[2:4], counts[2:4], config.balance),
        "lm": _divide(sums[4], counts[4]),
    }
    loss = config.w_speak * terms["speak"] + config.w_dst * terms["dst"] + config.w_lm * terms["lm"]
    return loss, terms


def _head_mean(sums: Tensor, counts: Tensor, balance: str) -> Tensor:
    """Mean of a head's [negative, positive] sums: over all frames, or over the classes that occur."""
    if balance == "none":
        return _divide(sums.sum(), counts.sum())
    return _divide(_divide(sums, counts).sum(), (counts > 0).sum())


def _divide(sums: Tensor, counts: Tensor) -> Tensor:
    """sums / counts; where a count is 0 its sum is 0, too, and stays."""
    return sums / torch.where(counts > 0, counts, 1)
