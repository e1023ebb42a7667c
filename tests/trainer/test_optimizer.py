"""Muon for hidden matrices, AdamW for the rest. (`test_resume` shows that a resume changes no bit.)"""

from __future__ import annotations

import pytest
import torch

from trainer.train import MuonAdamW, orthogonalised


def test_singular_values_come_near_1_whatever_else_is_in_the_batch():
    left, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    matrix = left[:, :4] @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.05]))  # [8, 4]
    values = torch.linalg.svdvals(orthogonalised(torch.stack([matrix, torch.zeros(8, 4)]))[0])
    assert 0.6 < values.min() <= values.max() < 1.3


def test_matrices_move_along_singular_vectors_and_the_rest_as_adamw():
    matrix, bias = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [matrix], "muon": True, "weight_decay": 0.0}, {"params": [bias]}]
    optimizer = MuonAdamW(groups, lr=0.1)
    matrix.grad, bias.grad = torch.zeros(4, 2), torch.ones(1)
    matrix.grad[0, 0] = 7.0
    optimizer.step()
    assert bias.item() == pytest.approx(-0.1, abs=1e-6)  # AdamW's first step is the learning rate
    # lr 0.1 * 0.2 * sqrt(4) = 0.04 times a singular value between 0.65 and 1.2, against the gradient
    assert -0.048 < matrix[0, 0].item() < -0.026
    assert matrix.flatten()[1:].tolist() == [0.0] * 7
