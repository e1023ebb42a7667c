"""ProAssist's dialogue metrics: free-running texts matched to the reference's by time and meaning.

Each predicted text is paired with at most one reference near it in time, so that the sum of dissimilarity and distance
is least; a pair is right where its sentences are similar. So the right moment with the wrong words is an error here,
and none in the event metrics. Built from the paper (arXiv 2506.05904, section 4 and appendix B.1) and checked against
its code (github.com/pro-assist/ProAssist at 9d0b2b2, mmassist/eval/evaluators/pred_match.py), which pairs frames, not
texts (docs/prior-work.md). The sentence encoder is any local sentence-transformers folder, run by transformers alone:
on 106 real and awkward texts all-MiniLM-L6-v2 gave sentence-transformers' numbers to 2e-7.

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
from scipy.optimize import linear_sum_assignment

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from trainer.evaluation.event_metrics import TOLERANCE, instant, is_event
from trainer.evaluation.scores import Floats, ScoredClip

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

Encoder = Callable[[list[str]], npt.NDArray[np.float32]]  # texts -> [N, D], each row of unit length
Utterance = tuple[float, str]  # (second, text)


class Dialogue(NamedTuple):
    """What one clip's assistant should have said, and what it said; both in any order."""

    clip_id: str
    reference: Sequence[Utterance]
    predicted: Sequence[Utterance]


def match_texts(
    dialogues: Iterable[Dialogue], encoder: Encoder, early_s: float = EARLY_S, late_s: float = LATE_S
) -> dict[str, Any]:
    """ProAssist's scores, pooled over the clips; the order of clips and texts changes no digit.

    predictions = matched + mismatched + redundant and references = matched + mismatched + missed: `mismatched` were
    paired in time but dissimilar. precision, recall, f1 count `matched`; missing_rate, redundant_rate and jaccard are
    ProAssist's; semantic_score (mean cosine) and distance_s (mean |seconds|) are over `matched`. None where a
    denominator is 0 (ProAssist says 0). `pairs`: [clip_id, predicted, reference, similarity], the middle two being
    positions in the dialogue as given.
    """
    dialogues = sorted(dialogues, key=lambda dialogue: dialogue.clip_id)
    texts = sorted({text for dialogue in dialogues for side in dialogue[1:] for _, text in side})
    vectors = dict(zip(texts, encoder(texts).astype(np.float64), strict=True)) if texts else {}
    pairs = [(d.clip_id, *pair) for d in dialogues for pair in _pairs(d, vectors, early_s, late_s)]
    predictions = sum(len(dialogue.predicted) for dialogue in dialogues)
    references = sum(len(dialogue.reference) for dialogue in dialogues)
    right = [(similarity, distance_s) for *_, similarity, distance_s in pairs if similarity > SIMILAR]
    return {
        "predictions": predictions,
        "references": references,
        "matched": len(right),
        "mismatched": len(pairs) - len(right),
        "redundant": predictions - len(pairs),
        "missed": references - len(pairs),
        "precision": _share(len(right), predictions),
        "recall": _share(len(right), references),
        "f1": _share(2 * len(right), predictions + references),
        "jaccard": _share(len(right), predictions + references - len(pairs)),
        "missing_rate": _share(references - len(pairs), references),
        "redundant_rate": _share(predictions - len(pairs), predictions),
        "semantic_score": _share(math.fsum(similarity for similarity, _ in right), len(right)),
        "distance_s": _share(math.fsum(distance for _, distance in right), len(right)),
        "pairs": [list(pair[:4]) for pair in pairs],
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _pairs(dialogue: Dialogue, vectors: dict[str, Floats], early_s: float, late_s: float) -> list[tuple[Any, ...]]:
    """(predicted, reference, similarity, distance_s) of the cheapest pairing of one clip: linear assignment with one
    silence per predicted text."""
    if not dialogue.predicted or not dialogue.reference:
        return []
    sides = (dialogue.predicted, dialogue.reference)
    predicted, reference = (sorted((at, text, i) for i, (at, text) in enumerate(side)) for side in sides)
    latency = np.subtract.outer([at for at, _, _ in predicted], [at for at, _, _ in reference])  # [P, R]
    rows, columns = (np.stack([vectors[text] for _, text, _ in side]) for side in (predicted, reference))
    similarity = np.abs(rows @ columns.T)  # ProAssist takes the absolute value
    costs = 1 - similarity + DELAY_WEIGHT * (np.abs(latency) / (max(early_s, late_s) or 1.0)) ** DELAY_POWER
    costs[(latency < -early_s - TOLERANCE) | (latency > late_s + TOLERANCE)] = np.inf
    silence = np.full((len(costs), len(costs)), SILENCE_COST)
    return [
        (predicted[i][2], reference[j][2], float(similarity[i, j]), abs(float(latency[i, j])))
        for i, j in zip(*linear_sum_assignment(np.hstack([costs, silence])), strict=True)
        if j < len(reference)
    ]


def dialogue_metrics(clips: Sequence[ScoredClip], encoder: Encoder, early_s: float, late_s: float) -> dict[str, Any]:
    """`match_texts` over free-running clips: numbers alone, with the window they hold for.

    ProAssist's own window for Assembly101 is EARLY_S, LATE_S. An empty text counts as a text. Raises InputError, naming
    the clip, where the scores have no texts.
    """
    dialogues = []
    for scored in clips:
        clip = scored.clip
        if scored.said is None:
            raise InputError(
                f"clip {clip.clip_id}: its scores do not tell what was said, expected those of a self-fed pass; "
                f"evaluate with --self-fed, or leave out --sentence-encoder"
            )
        said = [((clip.start_frame + i) / clip.fps, text) for i, text in enumerate(scored.said) if text is not None]
        dialogues.append(Dialogue(clip.clip_id, spoken(clip), said))
    scores = match_texts(dialogues, encoder, early_s, late_s)
    del scores["pairs"]
    return scores | {"early_s": early_s, "late_s": late_s}


def spoken(clip: ClipExample) -> list[Utterance]:
    """The reference's utterances by time; turns at the same time are one text, joined in order."""
    turns = [(instant(t, clip), t.text) for t in clip.turns if t.role == "assistant" and is_event(t, clip)]
    found: list[Utterance] = []
    last = -math.inf
    for at, text in sorted(turns, key=lambda utterance: utterance[0]):
        if at - last <= TOLERANCE:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
        else:
            found.append((at, text))
        last = at
    return found


def load_encoder(folder: Path) -> Encoder:
    """The sentence encoder in `folder`: texts -> float32 [N, D] of unit length, on the CPU, cut to the model's length.

    For sentence-transformers folders of a transformer and a mean or first-token pooling (all-MiniLM-L6-v2,
    all-mpnet-base-v2, ...), old and new. Reads safetensors and JSON only. Raises InputError for any other.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        pooling = _json(folder / "1_Pooling/config.json")
        text, whole = _json(folder / "sentence_bert_config.json"), _json(folder / "config_sentence_transformers.json")
        modes = sorted(key for key, on in pooling.items() if key.startswith("pooling_mode_") and on)
        mode = pooling.get("pooling_mode") or ", ".join(modes)
        lower, prompt = bool(text.get("do_lower_case")), whole.get("default_prompt_name")
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            mode = " + ".join(kinds)
        if mode not in FIRST_TOKEN or lower or prompt:
            raise InputError(
                f"{folder}: pooling {mode or 'unknown'}, do_lower_case {lower}, default prompt {prompt}; expected mean "
                f"or cls after one transformer, False, None; use another encoder, such as all-mpnet-base-v2"
            )
        encoder = _load_transformer(folder, FIRST_TOKEN[mode], text.get("max_seq_length"))
        encoder(["probe"])
    except InputError:
        raise
    except Exception as error:  # a damaged file raises whatever its parser does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder}: could not be loaded ({reason}); expected a complete sentence-transformers folder"
        ) from None
    return encoder


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _load_transformer(folder: Path, first_token: bool, most_tokens: int | None) -> Encoder:
    import torch  # here, since nothing else in this package needs torch or transformers
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
    model, loading = AutoModel.from_pretrained(
        str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
    )
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights missing, {missing[0]} first; get the encoder again")
    model.eval()
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    length = most_tokens or min(positions, tokenizer.model_max_length)

    @torch.inference_mode()
    def encode(texts: list[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))  # texts of like length share a batch
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            chosen = [texts[i] for i in batch]
            inputs = tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state  # [N, L, D]
            mask = inputs["attention_mask"][..., None].float()
            pooled = hidden[:, 0] if first_token else (hidden * mask).sum(1) / mask.sum(1)
            vectors[batch] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return vectors

    return encode
