"""What all sides of the trainer benchmark share: model sizes, random weights, and sequences, a pure function of a case.

Lengths are log-normal, median 220, sigma 0.7, cut to 48..1200 (mean 276): an assumption, that of the prototype in
`shared/notes`, not taken from data. Of a sequence's tokens about a tenth are supervised text, two thirds frames (one
token each), the rest prompt and user text. Half of the silent frames are supervised. Ids and features are noise: what
they say does not change what they cost.

Length grouping needs thousands of sequences to choose from, and a benchmark can run a few dozen. So the grouped
order is made over POOL sequences by the library's own function, and whole batches are taken from it, evenly from the
shortest to the longest. Every side trains on these sequences and no others; the sides that do not group get them
shuffled. The pool's own padding is reported beside the sample's, so that one sees whether the sample is fair.

    L tokens of a sequence    N frames    k tokens per frame (1)    D width of a cached feature    V vocabulary
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.trainer_pt_utils import get_length_grouped_indices

from pipeline.dataset import ClipExample
from trainer.config import TrainConfig
from trainer.features import feature_width
from trainer.model import DecisionHeads, tiny_config
from trainer.sequence import Window

POOL = 4000  # sequences that length grouping chooses from
MEDIAN, SIGMA, SHORTEST, LONGEST = 220, 0.7, 48, 1200  # tokens
AS_IT_COMES = 8  # the HF Trainer's default batch per device
IMAGE = 0  # the id that a frame's token has
FEATURES = 512  # distinct feature vectors, shared by all frames


@dataclass(frozen=True)
class Case:
    """One comparison: the model, and how much of what is run."""

    size: str  # of SIZES
    vocabulary: int
    bf16: bool = False  # autocast; else float32
    device: str = "cpu"
    steps: int = 5  # measured optimizer steps; one more, of short sequences, warms up
    clips: int = 16  # sequences per optimizer step
    batch: int = 8  # of them padded together by the length-grouped side
    budget: int = 2048  # tokens of one of our packs

    @property
    def name(self) -> str:
        return f"{self.size}, V={self.vocabulary}, {'bf16' if self.bf16 else 'float32'}, {self.device}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def train_config(self) -> TrainConfig:
        """Ours; its optimizer settings are everybody's."""
        return TrainConfig(
            lr=1e-4, clips_per_step=self.clips, max_tokens=LONGEST, micro_batch_tokens=self.budget,
            freeze=("vision",), bf16=self.bf16,
        )  # fmt: skip


# ---- models ------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, dict[str, int]]] = {  # 256M and 2.2B: the released models' sizes
    "mid": {
        "text": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
                 "num_key_value_heads": 2},
        "vision": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "image_size": 128, "patch_size": 16},
        "model": {"scale_factor": 4},
    },
    "256M": {
        "text": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                 "num_key_value_heads": 3},
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "image_size": 512, "patch_size": 16},
        "model": {"scale_factor": 4},
    },
    "2.2B": {
        "text": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                 "num_key_value_heads": 32},
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                   "image_size": 384, "patch_size": 14},
        "model": {"scale_factor": 3},
    },
}  # fmt: skip


def model_config(size: str, vocabulary: int) -> SmolVLMConfig:
    if size == "tiny":
        return tiny_config(vocabulary)
    found = SIZES[size]
    hidden = found["text"]["hidden_size"]
    text: dict[str, Any] = {
        "model_type": "llama", "vocab_size": vocabulary, "head_dim": 64, "max_position_embeddings": 8192,
        "initializer_range": hidden**-0.5, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    return SmolVLMConfig(
        text_config=text | found["text"], vision_config=found["vision"], image_token_id=IMAGE,
        tie_word_embeddings=False, **found["model"],
    )  # fmt: skip


def build(case: Case) -> tuple[SmolVLMForConditionalGeneration, DecisionHeads]:
    """Random weights, the same for every side. Heads are not zero, as ours start, so that all gradients flow."""
    torch.manual_seed(0)
    with torch.device(case.device):
        vlm = SmolVLMForConditionalGeneration(model_config(case.size, case.vocabulary))
        heads = DecisionHeads(vlm.config.text_config.hidden_size)
        for weight in (heads.speak.weight, heads.dst.weight):
            torch.nn.init.normal_(weight, std=0.02)
    return vlm, heads


# ---- sequences ---------------------------------------------------------------------------------------


class CachedNoise:
    """Stands in for the features that `encode` keeps: float16 [N, 1, D], read from memory."""

    def __init__(self, vlm: SmolVLMForConditionalGeneration) -> None:
        values = np.random.default_rng(1).standard_normal((FEATURES, 1, feature_width(vlm)), np.float32)
        self.table = values.astype(np.float16)

    def load(self, clip: ClipExample, start: int, end: int) -> np.ndarray:
        return self.table[(clip.clip * 131 + np.arange(start, end)) % FEATURES]


def pool_lengths() -> list[int]:
    draws = np.random.default_rng(0).normal(math.log(MEDIAN), SIGMA, POOL)
    return np.clip(np.exp(draws), SHORTEST, LONGEST).astype(int).tolist()


def grouped_batches(lengths: Sequence[int], batch: int, clips: int) -> list[list[int]]:
    """The batches of one epoch under `train_sampling_strategy="group_by_length"`, as numbers into `lengths`."""
    order = get_length_grouped_indices(lengths, clips, generator=torch.Generator().manual_seed(0))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def grouped_order(case: Case) -> list[int]:
    """Numbers into `pool_lengths()`: every side's sequences, in the length-grouped side's order."""
    lengths = pool_lengths()
    batches = [b for b in grouped_batches(lengths, case.batch, case.clips) if len(b) == case.batch]
    batches.sort(key=lambda b: sum(lengths[i] for i in b))
    wanted = case.steps * case.clips // case.batch
    chosen = [batches[int((i + 0.5) / wanted * len(batches))] for i in range(wanted)]
    return [i for b in np.random.default_rng(2).permutation(wanted) for i in chosen[b]]


def windows_of(case: Case, grouped: bool) -> list[Window]:
    """The warm-up step's sequences, then the measured ones: (1 + steps) x clips."""
    lengths, order = pool_lengths(), grouped_order(case)
    if not grouped:
        order = np.random.default_rng(3).permutation(order).tolist()
    warm = [make_window(POOL + i, 64, case.vocabulary) for i in range(case.clips)]
    return warm + [make_window(i, lengths[i], case.vocabulary) for i in order]


def make_window(number: int, length: int, vocabulary: int) -> Window:
    """A sequence of `length` tokens: prompt, then per event user text, frames and a supervised reply."""
    rng = np.random.default_rng([4, number])
    events = max(1, length // 60)
    replies = length // 10 + events  # the first token of a reply is no target
    frames = length * 13 // 20
    prompt = length // 8
    spoken = np.array_split(np.arange(length - prompt - frames - replies), events)
    ids = rng.integers(IMAGE + 1, vocabulary, length)
    frame_at, lm_at, last, at = [], [], [], prompt
    for user, shown, said in zip(
        spoken, np.array_split(np.arange(frames), events), np.array_split(np.arange(replies), events), strict=True
    ):
        at += len(user)
        frame_at += range(at, at + len(shown))
        last.append(len(frame_at) - 1)
        at += len(shown)
        lm_at += range(at, at + len(said) - 1)
        at += len(said)
    assert at == length
    ids[frame_at] = IMAGE
    labels = np.where(rng.random((2, frames)) < 0.5, 0, -100).astype(np.int8)
    labels[0, last], labels[1, last] = 1, np.arange(len(last)) % 2
    clip = _clip(number, frames, labels)
    return Window(clip, 0, 0, ids, np.array(frame_at)[:, None], np.array(lm_at, np.int64), labels)


def _clip(number: int, frames: int, labels: np.ndarray) -> ClipExample:
    return ClipExample(
        clip_id=f"c{number}", clip=number, video_uid=f"v{number}", recording_id=f"v{number}", fps=2.0, start_frame=0,
        num_frames=frames, frames_file=None, goal=None, knowledge=None, steps=(), initial_state=(), turns=(),
        sampling_seed=number, neg_rate=0.5, positive="span", labels=labels,
    )  # fmt: skip


# ---- counting ----------------------------------------------------------------------------------------


def computed_tokens(lengths: Sequence[int], batch: int) -> int:
    """Tokens that go through the model, padding included, where `batch` neighbours are padded together."""
    return sum(len(part) * max(part) for part in (lengths[i : i + batch] for i in range(0, len(lengths), batch)))


def pool_efficiency(batch: int, clips: int) -> tuple[float, float]:
    """Share of real tokens over a whole epoch of the pool: (random batches of 8, length-grouped ones of `batch`)."""
    lengths = pool_lengths()
    ordered = [lengths[i] for b in grouped_batches(lengths, batch, clips) for i in b]
    return sum(lengths) / computed_tokens(lengths, AS_IT_COMES), sum(lengths) / computed_tokens(ordered, batch)
