"""Loss terms as sums and counts, so that a step's loss does not depend on how it was cut into micro-batches.

    loss = w_speak * BCE_speaking + w_dst * BCE_dst_update + w_lm * CE_text

each term being the sum over supervised positions divided by their number in the *whole* optimizer step; the mean of
micro-batch means would be another number. Frames labelled -100 never reach the BCE: `supervise` lists the others on the
host, where the labels are. A sum over nothing is exactly 0 and still has a graph; never NaN.

    N frames of a batch    n supervised labels    T supervised text tokens    V vocabulary
    sums and counts are [5] (TERMS): per head negatives and positives, then text
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.schema import NOT_SAMPLED
from trainer.arms import ARMS, Arm
from trainer.config import TrainConfig
from trainer.packing import upload

TERMS = ("speaking_neg", "speaking_pos", "dst_update_neg", "dst_update_pos", "lm")


@dataclass(frozen=True)
class Supervision:
    """Which of a batch's logits [2 or 3, N] the loss reads, in the order of TERMS."""

    places: Tensor  # int64 [n] in the flattened logits
    weights: Tensor  # float [n]
    sizes: list[int]  # how many of the n belong to each of the first four TERMS

    def counts(self) -> Tensor:
        """float [4]: what each term's sum will be divided by, known before any forward pass."""
        return torch.stack([part.sum() for part in self.weights.split(self.sizes)])


def supervise(labels: Tensor, neg_rate: Tensor, arm: Arm = ARMS[TrainConfig.arm], reweigh: bool = False) -> Supervision:
    """Of labels int8 [2, N] that say *speak* and *DST update*, and rates float [N], both on the CPU.

    A supervised label weighs 1, or if `reweigh` 1 / neg_rate where it is a negative that was drawn: a 0, unless the
    other head is positive there (then it was kept for certain). Without a DST head nothing is supervised for it.
    """
    weights = torch.ones_like(labels, dtype=neg_rate.dtype)
    if reweigh:
        drawn = (labels == 0) & (labels.flip(0) != 1)
        weights = torch.where(drawn, 1 / neg_rate.clamp(min=2**-32), weights)
    if arm.decides == "token":
        return _supervise_token(labels, weights)
    dst_update = labels[1] if arm.dst_head else torch.full_like(labels[1], NOT_SAMPLED)
    both = torch.stack([labels[0], dst_update]).flatten()
    second = torch.arange(len(both)) >= labels.shape[1]
    places = [((both == value) & (second == head)).nonzero()[:, 0] for head in (False, True) for value in (0, 1)]
    chosen = torch.cat(places)
    return Supervision(chosen, weights.flatten()[chosen], [len(part) for part in places])


def _supervise_token(labels: Tensor, weights: Tensor) -> Supervision:
    """Of rows that say *speech*, *update*, *not silence* (`ProspectModel.decisions`): each -log p is the BCE of one.

    A frame has one label: update where the state changes, as its text comes first; else speech; silence where neither
    happens. Where one is not known (-100) and the other does not happen, the latter's probability is to be low.
    """
    speaks, updates = labels
    update, speech, silence = updates == 1, (speaks == 1) & (updates != 1), (speaks == 0) & (updates == 0)
    no_speech, no_update = (speaks == 0) & (updates < 0), (speaks < 0) & (updates == 0)
    negative, positive = (
        torch.stack(rows).flatten().nonzero()[:, 0]
        for rows in ((no_speech, no_update, silence), (speech, update, torch.zeros_like(update)))
    )
    chosen = torch.cat([negative, positive])
    weights = torch.cat([weights, weights[:1]])  # drawn negatives: where nothing happens, both rows weigh the same
    return Supervision(chosen, weights.flatten()[chosen], [len(negative), len(positive), 0, 0])


def bce_sums(logits: Tensor, supervised: Supervision) -> Tensor:
    """[4]: weighted BCE per head and class of logits [2, N] that say *speak* and *DST update* (token: [3, N])."""
    places, weights = upload(supervised.places, logits.device), upload(supervised.weights, logits.device)
    chosen = logits.flatten().index_select(0, places)
    parts = zip(chosen.split(supervised.sizes), weights.split(supervised.sizes), strict=True)
    return torch.stack([-(F.logsigmoid(x if i % 2 else -x) * weights).sum() for i, (x, weights) in enumerate(parts)])


def lm_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [T, V] with targets [T], summed; 0 with a graph where T is 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def combine(sums: Tensor, counts: Tensor, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its terms before their weights) from sums [5] over counts [5] of the whole step; linear in `sums`."""

    def divide(sums: Tensor, counts: Tensor) -> Tensor:
        return sums / torch.where(counts > 0, counts, 1)  # where a count is 0 its sum is 0, too, and stays

    def head(sums: Tensor, counts: Tensor) -> Tensor:
        """From [negative, positive]: the mean over all frames, or over the classes that occur."""
        if config.balance == "none":
            return divide(sums.sum(), counts.sum())
        return divide(divide(sums, counts).sum(), (counts > 0).sum())

    terms = {
        "speaking": head(sums[0:2], counts[0:2]),
        "dst_update": head(sums[2:4], counts[2:4]),
        "lm": divide(sums[4], counts[4]),
    }
    loss = config.w_speak * terms["speaking"] + config.w_dst * terms["dst_update"] + config.w_lm * terms["lm"]
    return loss, terms
