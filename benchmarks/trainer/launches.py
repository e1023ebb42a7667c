"""Operators that one pack and one optimizer step launch, counted on fake tensors: no GPU, no data, no time.

    python benchmarks/trainer/launches.py            a table on stdout, for the torch that runs it

Forward and backward pass of one full pack under bf16, then clipping and AdamW. Counted is every operator that is no
view (`tests/trainer/counting.py`); on a GPU some of them launch several kernels. The device is a fake CPU that takes
CUDA's path through attention, as autograd does not run on fake CUDA tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/trainer"), str(ROOT / "benchmarks/trainer")]

import transformers  # noqa: E402
from counting import Waits  # noqa: E402
from shared import CachedNoise, Case, build, make_window, pool_lengths  # noqa: E402

import trainer.attention  # noqa: E402
from trainer.loss import supervise  # noqa: E402
from trainer.model import ProspectModel  # noqa: E402
from trainer.packing import pack_windows  # noqa: E402
from trainer.train import make_optimizer, sum_terms  # noqa: E402

CASES = (("tiny", 512, 4096), ("256M", 49280, 4096), ("256M", 49280, 16384), ("2.2B", 49280, 8192))


def counts(size: str, vocabulary: int, budget: int) -> tuple[int, int, int, int]:
    """(windows, tokens, launches of a pack, launches of clipping and the optimizer)"""
    case = Case(size, vocabulary, bf16=True, budget=budget)
    config = case.train_config()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        model = ProspectModel(*build(case), config).train()
        with unset_fake_temporarily():
            windows = [make_window(i, n, vocabulary) for i, n in enumerate(pool_lengths()[:64])]
            pack = pack_windows(windows, CachedNoise(model.vlm), budget)[0].loaded()
            chosen = supervise(pack.labels, pack.neg_rate)
        optimizer = make_optimizer(model, config)
        with Waits("cpu") as of_pack:
            sum_terms(model, pack, chosen).sum().backward()
        with Waits("cpu") as of_step:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return len(pack.seg_lens), len(pack.input_ids), of_pack.launches, of_step.launches


def main() -> None:
    if hasattr(trainer.attention, "takes_varlen"):
        trainer.attention.takes_varlen = lambda value: value.dtype == torch.bfloat16  # type: ignore[assignment]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print("| size | budget | windows | tokens | operators of a pack | of clipping and AdamW |")
    for case in CASES:
        windows, tokens, of_pack, of_step = counts(*case)
        print(f"| {case[0]} | {case[2]:,} | {windows} | {tokens:,} | {of_pack:,} | {of_step:,} |", flush=True)


if __name__ == "__main__":
    main()
