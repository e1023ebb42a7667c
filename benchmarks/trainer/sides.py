"""One side of the trainer benchmark, alone in its process: `python sides.py SIDE CASE_JSON` prints one JSON line.

    ours         trainer.train_step over packs of at most `budget` tokens
    hf           transformers.Trainer as it comes: random batches of 8, padded, LM head on every token
    hf-grouped   the same at its best: length-grouped batches
    check        not a rival: loss and gradient norm of both models on the same 8 sequences
    rate, encode  not rivals: ours again, and the vision tower, with the FLOP they take (`limits.py`)

Fair to HF: SDPA attention, right padding (its mask is made once per batch), no KV cache, fused AdamW with our
settings, no logging, no saving, no evaluation, no worker processes, only the loss returned (returned logits would be
copied to float32 under bf16), the tower frozen and its features cached, the connector and heads ours. Its model
returns the mean over a micro-batch, as people write it: a mean of means is not the mean of the step (trainer/loss.py),
but costs the same.

What is unfair to whom: `results.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import limits
import torch
import torch.nn.functional as F
from shared import AS_IT_COMES, CachedNoise, Case, build, computed_tokens, windows_of
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from trainer.distributed import World
from trainer.features import run_connector
from trainer.loader import Transfer, uploaded
from trainer.model import DecisionHeads, ProspectModel
from trainer.packing import make_pack, pack_windows
from trainer.sequence import Window
from trainer.train import make_optimizer, train_step


class Clock:
    """Seconds, and memory of the accelerator, between `base`, `start` and `stop`."""

    def __init__(self, case: Case) -> None:
        self.case, self.found = case, dict[str, float]()

    def base(self) -> None:
        """Model and data are there; optimizer and activations are not. Memory is counted over this."""
        if self.case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()
        self.found["base_at"] = time.monotonic()

    def start(self) -> None:
        self._wait()
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def stop(self) -> None:
        self._wait()
        self.found |= {"wall_s": time.monotonic() - self.wall, "cpu_s": time.process_time() - self.cpu}
        self.found["end_at"] = time.monotonic()
        if self.case.device == "cuda":
            self.found["memory_mb"] = (torch.cuda.max_memory_allocated() - self.allocated) / 1e6

    def _wait(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()


# ---- ours --------------------------------------------------------------------------------------------


def ours(case: Case, clock: Clock) -> dict[str, float]:
    vlm, heads = build(case)
    windows, frames, config = windows_of(case, grouped=False), CachedNoise(vlm), case.train_config()
    model, world = ProspectModel(vlm, heads, config).train(), World(device=torch.device(case.device))
    clock.base()
    optimizer = make_optimizer(model, config)
    by_step = (windows[at : at + case.clips] for at in range(0, len(windows), case.clips))
    packed = (pack_windows(one, frames, case.budget) for one in by_step)
    for step, packs in enumerate(uploaded(packed, Transfer(world.device))):
        if step == 1:
            clock.start()
        train_step(model, optimizer, packs, config, world)
    clock.stop()
    real = sum(len(w.input_ids) for w in windows[case.clips :])
    return {"tokens": real, "computed": real}


# ---- the HF Trainer ----------------------------------------------------------------------------------


class Padded(nn.Module):
    """SmolVLM on cached features with two heads, as one writes it for the HF Trainer: loss over a padded batch.

    B sequences    L the longest    H hidden    N frames of all
    """

    def __init__(self, vlm: SmolVLMForConditionalGeneration, heads: DecisionHeads) -> None:
        super().__init__()
        self.vlm, self.heads = vlm, heads
        vlm.model.vision_model.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,  # int64 [B, L]
        attention_mask: Tensor,  # int64 [B, L]
        labels: Tensor,  # int64 [B, L]
        features: Tensor,  # float [N, 1, D]
        frame_index: Tensor,  # int64 [N] into B x L
        decisions: Tensor,  # int8 [2, N]
    ) -> dict[str, Tensor]:
        body = self.vlm.model.text_model
        embedded = body.embed_tokens(input_ids)
        seen = run_connector(self.vlm, features.float()).flatten(0, 1).to(embedded.dtype)
        filled = embedded.flatten(0, 1).index_copy(0, frame_index, seen).view_as(embedded)
        hidden = body(inputs_embeds=filled, attention_mask=attention_mask, use_cache=False).last_hidden_state
        # From here on what SmolVLMForConditionalGeneration does itself with `labels`.
        logits = self.vlm.lm_head(hidden)
        vocabulary = self.vlm.config.text_config.vocab_size
        loss = self.vlm.loss_function(logits=logits, labels=labels, vocab_size=vocabulary)
        scores = self.heads(hidden.flatten(0, 1)[frame_index])  # [2, N]
        return {"loss": loss + _bce(scores[0], decisions[0]) + _bce(scores[1], decisions[1])}


def _bce(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels != -100
    return F.binary_cross_entropy_with_logits(logits[kept], labels[kept].float())


class Collate:
    """Windows -> a right-padded batch."""

    def __init__(self, frames: CachedNoise) -> None:
        self.frames = frames

    def __call__(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        longest = max(len(w.input_ids) for w in windows)
        ids = torch.zeros(len(windows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        index = []
        for row, window in enumerate(windows):
            tokens = torch.from_numpy(window.input_ids)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            targets = torch.from_numpy(window.lm_positions) + 1
            labels[row, targets] = tokens[targets]
            index.append(torch.from_numpy(window.frame_positions[:, -1]) + row * longest)
        features = [torch.from_numpy(self.frames.load(w.clip, w.first_frame, w.end_frame)) for w in windows]
        decisions = [torch.from_numpy(w.labels) for w in windows]
        return {
            "input_ids": ids, "attention_mask": mask, "labels": labels, "features": torch.cat(features),
            "frame_index": torch.cat(index), "decisions": torch.cat(decisions, 1),
        }  # fmt: skip


class Ticks(TrainerCallback):
    def __init__(self, case: Case, clock: Clock) -> None:
        self.case, self.clock = case, clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.clock.start()
        if state.global_step == 1 + self.case.steps:
            self.clock.stop()


def hf(case: Case, clock: Clock, grouped: bool) -> dict[str, float]:
    vlm, heads = build(case)
    windows, frames, config = windows_of(case, grouped), CachedNoise(vlm), case.train_config()
    batch = case.batch if grouped else AS_IT_COMES
    model = Padded(vlm, heads).train()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=1 + case.steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=case.clips // batch, learning_rate=config.lr, lr_scheduler_type="constant",
            weight_decay=config.weight_decay, adam_beta1=config.betas[0], adam_beta2=config.betas[1],
            max_grad_norm=config.grad_clip, optim="adamw_torch_fused", bf16=case.bf16, use_cpu=case.device == "cpu",
            train_sampling_strategy="sequential", dataloader_num_workers=0, remove_unused_columns=False,
            report_to="none", logging_strategy="no", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        ticks = Ticks(case, clock)
        clock.base()
        trainer = Trainer(model, arguments, train_dataset=windows, data_collator=Collate(frames), callbacks=[ticks])
        trainer.train()
    lengths = [len(w.input_ids) for w in windows[case.clips :]]
    return {"tokens": sum(lengths), "computed": computed_tokens(lengths, batch)}


# ---- is it the same work? ----------------------------------------------------------------------------


def check(case: Case) -> dict[str, float]:
    """Loss and gradient norm of each side's model on the first measured batch, from the same weights."""
    windows = windows_of(case, grouped=True)[case.clips : case.clips + AS_IT_COMES]
    vlm, heads = build(case)
    frames, config = CachedNoise(vlm), case.train_config()
    model, world = ProspectModel(vlm, heads, config).train(), World(device=torch.device(case.device))
    unmoved = torch.optim.SGD(model.parameters(), lr=0.0)
    ours = train_step(model, unmoved, [make_pack(windows, frames)], config, world)
    del model, vlm, heads, unmoved

    padded = Padded(*build(case)).train()
    batch = {name: value.to(case.device) for name, value in Collate(frames)(windows).items()}
    with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
        loss = padded(**batch)["loss"]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in padded.parameters() if p.grad is not None])
    return {"ours_loss": ours.loss, "ours_norm": ours.grad_norm, "hf_loss": float(loss), "hf_norm": float(norm)}


def main(side: str, case: Case) -> dict[str, float]:
    clock = Clock(case)
    if side == "check":
        return check(case)
    if side == "encode":
        return limits.encode(case, clock)
    counted = hf(case, clock, side == "hf-grouped") if side.startswith("hf") else ours(case, clock)
    return clock.found | counted | (limits.of_step(case) if side == "rate" else {})


if __name__ == "__main__":
    case = Case.from_json(sys.argv[2])
    if case.device == "cpu":
        torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        found = main(sys.argv[1], case)
    print(json.dumps(found))
