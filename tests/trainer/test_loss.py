from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from trainer.config import TrainConfig
from trainer.loss import bce_sums, combine, lm_sum, supervise


def bce(logit: float, label: int) -> float:
    return math.log1p(math.exp(-logit if label else logit))


def head_sums(logits, labels, neg_rate=None, reweigh=False):
    """(sums, counts), [4] each."""
    rate = torch.ones(labels.shape[1], dtype=logits.dtype) if neg_rate is None else neg_rate
    supervised = supervise(labels, rate, reweigh=reweigh)
    return bce_sums(logits, supervised), supervised.counts()


def sums_of(logits, labels, **config):
    sums, counts = head_sums(tensor(logits), tensor(labels))
    return combine(torch.cat([sums, torch.zeros(1)]), torch.cat([counts, torch.zeros(1)]), TrainConfig(**config))


def test_sums_by_hand_and_nothing_where_no_label_is():
    """TRAPS 16. NaN at a label of -100 shows that its logit is not read; by head: sums of labels 0, of labels 1."""
    logits = tensor([[0.0, 2.0, math.nan], [1.0, -1.0, 5.0]], requires_grad=True)
    sums, counts = head_sums(logits, tensor([[0, 1, -100], [1, 1, 0]]))
    expected = [bce(0, 0), bce(2, 1), bce(5, 0), bce(1, 1) + bce(-1, 1)]
    assert sums.tolist() == pytest.approx(expected)
    assert counts.tolist() == [1, 1, 1, 2]
    sums.sum().backward()
    assert (logits.grad != 0).tolist() == [[True, True, False], [True, True, True]]


def test_direct_and_inverted_losses_and_gradients_are_the_same_bits():
    torch.manual_seed(0)
    labels, rate = torch.randint(0, 2, (2, 500)), torch.ones(500)
    direct = (6 * torch.randn(2, 500)).requires_grad_()
    mirrored = (-direct).detach().requires_grad_()
    a, b = bce_sums(direct, supervise(labels, rate)), bce_sums(mirrored, supervise(1 - labels, rate))
    assert torch.equal(a, b[[1, 0, 3, 2]])
    (x,), (y,) = torch.autograd.grad(a.sum(), direct), torch.autograd.grad(b.sum(), mirrored)
    assert torch.equal(x, -y)


def test_nothing_supervised_is_exactly_zero_with_a_graph():
    logits = torch.randn(2, 4, requires_grad=True)
    text = torch.randn(0, 7, requires_grad=True)
    sums, counts = head_sums(logits, torch.full((2, 4), -100))
    sums = torch.cat([sums, lm_sum(text, torch.zeros(0, dtype=torch.int64))[None]])
    counts = torch.cat([counts, torch.zeros(1)])
    for balance in ("none", "mean"):
        loss, terms = combine(sums, counts, TrainConfig(balance=balance))
        assert loss.item() == 0
        assert all(term.item() == 0 for term in terms.values())
        loss.backward(retain_graph=True)
    assert (logits.grad == 0).all()
    assert text.grad is not None


def test_pooled_mean_is_not_the_mean_of_means():
    """TRAPS 18: 3 supervised frames that are badly wrong and 121 that are right."""
    logits = tensor([[2.0] * 3 + [-2.2] * 121, [0.0] * 124])
    labels = torch.zeros(2, 124)
    labels[1] = -100
    first, rest = (bce(2, 0), bce(-2.2, 0))
    pooled, _ = sums_of(logits.tolist(), labels.tolist())
    assert float(pooled) == pytest.approx((3 * first + 121 * rest) / 124)
    assert (first + rest) / 2 > 6 * float(pooled)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from(["none", "mean"]), st.randoms())
def test_any_micro_batches_add_up_to_the_step_and_unlabelled_frames_are_not_read(sizes, balance, random):
    labels = tensor([[random.choice([0, 0, 1, -100]) for _ in range(sum(sizes))] for _ in (0, 1)]).reshape(2, -1)
    logits = tensor([random.uniform(-4, 4) for _ in range(labels.numel())], dtype=torch.float64).reshape(2, -1)
    config, none = TrainConfig(balance=balance, w_speak=1, w_dst=0.5), torch.zeros(1, dtype=torch.float64)
    read = torch.where(labels == -100, torch.nan, logits)
    parts = [head_sums(x, y) for x, y in zip(read.split(sizes, 1), labels.split(sizes, 1), strict=True)]
    counts = torch.cat([sum(count for _, count in parts), none])
    found = sum(combine(torch.cat([part, none]), counts, config)[0] for part, _ in parts)
    by_class = [
        [bce(x, y) for x, y in zip(*row, strict=True) if y == label]
        for row in zip(logits.tolist(), labels.tolist(), strict=True)
        for label in (0, 1)
    ]
    whole, _ = combine(torch.cat([tensor([*map(sum, by_class)], dtype=torch.float64), none]), counts, config)
    assert float(found) == pytest.approx(float(whole), abs=1e-12)


def test_balance_mean_weighs_classes_equally_over_the_step():
    logits, labels = [[0.0, 0.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0]], [[0, 0, 0, 1], [0, 0, 0, -100]]
    _, terms = sums_of(logits, labels, balance="mean")
    assert float(terms["speaking"]) == pytest.approx((bce(0, 0) + bce(3, 1)) / 2)
    assert float(terms["dst_update"]) == pytest.approx(bce(1, 0))  # one class occurs: its mean alone
    _, terms = sums_of(logits, labels, balance="none")
    assert float(terms["speaking"]) == pytest.approx((3 * bce(0, 0) + bce(3, 1)) / 4)


def test_reweigh_counts_drawn_negatives_as_one_over_the_rate():
    labels = tensor([[0, 0, 1, -100, 1], [0, 1, 0, -100, 1]])
    rate = tensor([0.25, 0.25, 0.5, 0.5, 0.5])
    supervised = supervise(labels, rate, reweigh=True)
    assert supervised.places.tolist() == [0, 1, 2, 4, 5, 7, 6, 9]  # speak 0s, speak 1s, DST 0s, DST 1s
    assert supervised.weights.tolist() == [4, 1, 1, 1, 4, 1, 1, 1]
    assert supervised.sizes == [2, 2, 2, 2]
    assert supervise(labels, rate).weights.unique().tolist() == [1]
    sums, counts = head_sums(torch.zeros(2, 5), labels, rate, reweigh=True)
    assert counts.tolist() == [5, 2, 5, 2]
    assert sums.tolist() == pytest.approx([n * math.log(2) for n in (5, 2, 5, 2)])
