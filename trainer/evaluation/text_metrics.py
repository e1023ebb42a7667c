"""What was said against what should have been said: ProAssist's matching by time and meaning, for live scores.

Each predicted text is paired with at most one reference near it in time, so that the sum of unlikeness and distance is
least; a pair counts as right where its sentences are alike. So a reply at the right moment with the wrong words is an
error here, and none in `events`. Built from the paper (arXiv 2506.05904, section 4 and appendix B.1) and checked
against its code (github.com/pro-assist/ProAssist at 9d0b2b2, mmassist/eval/evaluators/pred_match.py), which pairs
frames, not texts: docs/prior-work.md tells the differences.

The sentence encoder is any local sentence-transformers folder, run by transformers alone: no further package, nothing
fetched. On 106 real and awkward texts all-MiniLM-L6-v2 gave sentence-transformers' numbers to 2e-7, in 8 ms of one
core for a text of 15 words; pairing 1,000 clips of 40 texts a side takes 0.5 s.

    N texts    D width of an embedding    P predicted texts of a clip    R reference texts of a clip
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from trainer.evaluation.event_metrics import TOLERANCE, instant, is_event
from trainer.evaluation.scores import ScoredClip

# ProAssist's constants: StreamEvaluator.__init__ (its defaults, and appendix B.1) and eval_utils.get_match_time_window
SIMILAR: Final = 0.5  # a pair is right where the cosine is above this
DELAY_WEIGHT: Final = 0.3  # cost of the distance in time at the window's longer side
DELAY_POWER: Final = 1.5  # how that cost grows
SILENCE_COST: Final = 1.0  # of pairing a text with nothing: what two unrelated sentences cost
EARLY_S: Final = 4.0  # Assembly101: a text may come 4 s before its reference,
LATE_S: Final = 2.0  # but 2 s after it at most: the user should hear of a step before doing it
BATCH: Final = 64
FIRST_TOKEN: Final = {  # by pooling, as older folders and newer ones (sentence-transformers 6.2) write it
    "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True, "mean": False, "cls": True,
}  # fmt: skip
ANOTHER: Final = "use another encoder, such as all-mpnet-base-v2"

Floats = npt.NDArray[np.float64]
Encoder = Callable[[list[str]], npt.NDArray[np.float32]]  # texts -> [N, D], each row of unit length
Utterance = tuple[float, str]  # (second, text)


class Dialogue(NamedTuple):
    """What one clip's assistant should have said, and what it said; both in any order."""

    clip_id: str
    reference: Sequence[Utterance]
    predicted: Sequence[Utterance]


class _Pair(NamedTuple):
    clip_id: str
    predicted: int  # position in the dialogue's own order
    reference: int
    similarity: float
    distance_s: float

    @property
    def alike(self) -> bool:
        return self.similarity > SIMILAR


# ---- matching ----------------------------------------------------------------------------------------


def match_texts(
    dialogues: Iterable[Dialogue], encoder: Encoder, early_s: float = EARLY_S, late_s: float = LATE_S
) -> dict[str, Any]:
    """ProAssist's scores, pooled over the clips; the order of clips and texts changes no digit.

    predictions = matched + mismatched + redundant and references = matched + mismatched + missed: `mismatched` were
    paired in time but unlike. precision, recall, f1 count `matched`; missing_rate, redundant_rate and jaccard are
    ProAssist's; semantic_score (mean cosine) and distance_s (mean |seconds|) are over `matched`. None where a
    denominator is 0 (ProAssist says 0). `pairs`: [clip_id, predicted, reference, similarity], the middle two being
    positions in the dialogue as given.
    """
    chosen = sorted(dialogues, key=lambda dialogue: dialogue.clip_id)
    vectors = _embed(chosen, encoder)
    pairs = [pair for dialogue in chosen for pair in _pairs(dialogue, vectors, early_s, late_s)]
    predictions = sum(len(dialogue.predicted) for dialogue in chosen)
    references = sum(len(dialogue.reference) for dialogue in chosen)
    alike = [pair for pair in pairs if pair.alike]
    return {
        "predictions": predictions,
        "references": references,
        "matched": len(alike),
        "mismatched": len(pairs) - len(alike),
        "redundant": predictions - len(pairs),
        "missed": references - len(pairs),
        "precision": _share(len(alike), predictions),
        "recall": _share(len(alike), references),
        "f1": _share(2 * len(alike), predictions + references),
        "jaccard": _share(len(alike), predictions + references - len(pairs)),
        "missing_rate": _share(references - len(pairs), references),
        "redundant_rate": _share(predictions - len(pairs), predictions),
        "semantic_score": _share(math.fsum(pair.similarity for pair in alike), len(alike)),
        "distance_s": _share(math.fsum(pair.distance_s for pair in alike), len(alike)),
        "pairs": [[pair.clip_id, pair.predicted, pair.reference, pair.similarity] for pair in pairs],
    }


def dialogue_metrics(clips: Sequence[ScoredClip], encoder: Encoder, early_s: float, late_s: float) -> dict[str, Any]:
    """`match_texts` over live clips: numbers alone, with the window they hold for.

    ProAssist's own window for Assembly101 is EARLY_S, LATE_S. A text that was said counts, also an empty one.
    Raises InputError, naming the clip, where nothing is known of what was said (scores alone).
    """
    scores = match_texts([_dialogue(scored) for scored in clips], encoder, early_s, late_s)
    del scores["pairs"]
    return scores | {"early_s": early_s, "late_s": late_s}


def spoken(clip: ClipExample) -> list[Utterance]:
    """The reference: what `events` takes as the assistant's, by time; co-timed turns are one text, joined in order."""
    turns = [
        (instant(turn, clip), turn.text) for turn in clip.turns if turn.role == "assistant" and is_event(turn, clip)
    ]
    joined: list[list[Utterance]] = []
    for utterance in sorted(turns, key=lambda utterance: utterance[0]):
        if joined and utterance[0] - joined[-1][-1][0] <= TOLERANCE:
            joined[-1].append(utterance)
        else:
            joined.append([utterance])
    return [(group[0][0], " ".join(text for _, text in group)) for group in joined]


def _dialogue(scored: ScoredClip) -> Dialogue:
    clip = scored.clip
    if scored.said is None:
        raise InputError(
            f"clip {clip.clip_id}: its scores do not tell what was said, expected those of a self-fed pass; "
            f"evaluate with --self-fed, or leave out --sentence-encoder"
        )
    said = [((clip.start_frame + i) / clip.fps, text) for i, text in enumerate(scored.said) if text is not None]
    return Dialogue(clip.clip_id, spoken(clip), said)


def _embed(dialogues: Sequence[Dialogue], encoder: Encoder) -> dict[str, Floats]:
    """Each distinct text's embedding [D]. Always the same batches for the same texts, so the same digits."""
    texts = sorted({text for dialogue in dialogues for side in dialogue[1:] for _, text in side})
    if not texts:
        return {}
    return dict(zip(texts, encoder(texts).astype(np.float64), strict=True))


def _pairs(dialogue: Dialogue, vectors: dict[str, Floats], early_s: float, late_s: float) -> list[_Pair]:
    """The cheapest pairing of one clip, in time: linear assignment with one silence per predicted text."""
    if not dialogue.predicted or not dialogue.reference:
        return []
    predicted, reference = _in_time(dialogue.predicted), _in_time(dialogue.reference)
    at = np.array([dialogue.predicted[i][0] for i in predicted])  # [P]
    due = np.array([dialogue.reference[j][0] for j in reference])  # [R]
    latency = at[:, None] - due  # [P, R]
    similarity = _cosines(
        [dialogue.predicted[i][1] for i in predicted], [dialogue.reference[j][1] for j in reference], vectors
    )
    rows, columns = linear_sum_assignment(_costs(similarity, latency, early_s, late_s))
    return [
        _Pair(dialogue.clip_id, predicted[i], reference[j], float(similarity[i, j]), abs(float(latency[i, j])))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        if j < len(reference)
    ]


def _costs(similarity: Floats, latency: Floats, early_s: float, late_s: float) -> Floats:
    """[P, R + P]: of pairing with each reference (inf outside the window), then of pairing with silence."""
    reach = max(early_s, late_s) or 1.0
    costs = 1 - similarity + DELAY_WEIGHT * (np.abs(latency) / reach) ** DELAY_POWER
    costs[(latency < -early_s - TOLERANCE) | (latency > late_s + TOLERANCE)] = np.inf
    return np.hstack([costs, np.full((len(costs), len(costs)), SILENCE_COST)])


def _cosines(predicted: Sequence[str], reference: Sequence[str], vectors: dict[str, Floats]) -> Floats:
    """[P, R]; ProAssist takes the absolute value."""
    left, right = (np.stack([vectors[text] for text in texts]) for texts in (predicted, reference))
    return np.abs(left @ right.T)


def _in_time(utterances: Sequence[Utterance]) -> list[int]:
    return sorted(range(len(utterances)), key=lambda i: utterances[i])


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


# ---- the sentence encoder ----------------------------------------------------------------------------


def load_encoder(folder: Path) -> Encoder:
    """The sentence encoder in `folder`: texts -> float32 [N, D] of unit length, on the CPU, cut to the model's length.

    For folders of a transformer and a mean or first-token pooling (all-MiniLM-L6-v2, all-mpnet-base-v2, ...), in the
    older and the newer form of their files. Reads safetensors and JSON only. Raises InputError for any other.
    """
    try:
        encoder = _Transformer(folder, **_layout(folder))
        encoder(["probe"])
    except InputError:
        raise
    except Exception as error:  # a damaged file raises whatever its parser does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: the sentence encoder could not be loaded ({reason}); get it again") from None
    return encoder


def _layout(folder: Path) -> dict[str, Any]:
    """What the folder's own files say of pooling and length; InputError where they ask for more than we do."""
    modules = _json(folder / "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
        raise InputError(
            f"{folder / 'modules.json'}: {' + '.join(kinds)}, expected Transformer + Pooling (+ Normalize); {ANOTHER}"
        )
    pooling = _json(folder / modules[1]["path"] / "config.json")
    text, whole = (
        _json(folder / name, {}) for name in ("sentence_bert_config.json", "config_sentence_transformers.json")
    )
    switched_on = sorted(key for key, on in pooling.items() if key.startswith("pooling_mode_") and on)
    mode = pooling.get("pooling_mode") or ", ".join(switched_on)
    lower, prompt = bool(text.get("do_lower_case")), whole.get("default_prompt_name")
    if mode not in FIRST_TOKEN or lower or prompt:
        raise InputError(
            f"{folder}: pooling {mode or 'unknown'}, do_lower_case {lower}, default prompt {prompt}; "
            f"expected mean or cls, False, None; {ANOTHER}"
        )
    return {"first_token": FIRST_TOKEN[mode], "most_tokens": text.get("max_seq_length")}


def _json(path: Path, absent: Any = None) -> Any:
    if absent is not None and not path.exists():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}), expected a sentence-transformers folder; give one"
        ) from None


class _Transformer:
    """A transformer, pooled. torch and transformers are imported here: nothing else in this package needs them."""

    def __init__(self, folder: Path, first_token: bool, most_tokens: int | None) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # stderr is the caller's
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        self.model, loading = AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise InputError(f"{folder}: {len(missing)} weights missing, {missing[0]} first; get the encoder again")
        self.model.eval()
        self.first_token = first_token
        positions = getattr(self.model.config, "max_position_embeddings", self.tokenizer.model_max_length)
        self.most_tokens = most_tokens or min(positions, self.tokenizer.model_max_length)

    def __call__(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """[N, D]; texts of like length share a batch."""
        out = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            out[chosen] = self._batch([texts[i] for i in chosen])
        return out

    def _batch(self, texts: list[str]) -> npt.NDArray[np.float32]:
        import torch

        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.most_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**inputs).last_hidden_state  # [N, L, D]
            mask = inputs["attention_mask"][..., None].float()
            pooled = hidden[:, 0] if self.first_token else (hidden * mask).sum(1) / mask.sum(1)
            vectors: npt.NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return vectors
