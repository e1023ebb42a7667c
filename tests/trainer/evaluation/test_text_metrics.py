"""Matching by meaning, with sentences whose likeness is known by construction, and the encoder with a tiny BERT.

In `letters` a text's embedding counts its words among a..h: "a" and "a" have cosine 1, "a" and "a b" 0.707, "a b" and
"a c" 0.5, "a" and "b" 0.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import clip_example, turn
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from pipeline.dataset import Turn
from pipeline.errors import InputError
from trainer.evaluation.text_metrics import Dialogue, dialogue_metrics, load_encoder, match_texts, spoken


def letters(texts: list[str]) -> np.ndarray:
    """float32 [N, 8]"""
    counts = np.array([[text.split().count(word) for word in "abcdefgh"] for text in texts], np.float32)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def match(reference: list[tuple[float, str]], predicted: list[tuple[float, str]], **window: float) -> dict[str, Any]:
    return match_texts([Dialogue("c", reference, predicted)], letters, **window)


def outcome(scores: dict[str, Any]) -> tuple[int, int, int, int]:
    return scores["matched"], scores["mismatched"], scores["redundant"], scores["missed"]


FAR_WORDS = [(10.0, "a b c d e")], "a f g h"  # cosine 1 / sqrt(20) = 0.224
TURNED = {"early_s": 2, "late_s": 4}


@pytest.mark.parametrize(
    ("reference", "predicted", "window", "counts"),
    [
        ([(10.0, "a"), (20.0, "b c")], [(10.0, "a"), (20.0, "b c")], {}, (2, 0, 0, 0)),
        # a text may come four seconds early and two late
        ([(10.0, "a")], [(5.9, "a")], {}, (0, 0, 1, 1)),
        ([(10.0, "a")], [(6.0, "a")], {}, (1, 0, 0, 0)),
        ([(10.0, "a")], [(12.0, "a")], {}, (1, 0, 0, 0)),
        ([(10.0, "a")], [(12.1, "a")], {}, (0, 0, 1, 1)),
        ([(10.0, "a")], [(14.0, "a")], TURNED, (1, 0, 0, 0)),
        ([(10.0, "a")], [(6.0, "a")], TURNED, (0, 0, 1, 1)),
        # other words are paired but wrong; silence is cheaper 4 s off (0.3), not 3 s (0.3 * (3 / 4)**1.5 = 0.195)
        (FAR_WORDS[0], [(10.0, FAR_WORDS[1])], {}, (0, 1, 0, 0)),
        (FAR_WORDS[0], [(6.0, FAR_WORDS[1])], {}, (0, 0, 1, 1)),
        (FAR_WORDS[0], [(7.0, FAR_WORDS[1])], {}, (0, 1, 0, 0)),
        # a cosine of exactly a half is not enough
        ([(1.0, "a b")], [(1.0, "a c")], {}, (0, 1, 0, 0)),
        ([(1.0, "a b c")], [(1.0, "a b d")], {}, (1, 0, 0, 0)),
        # a second telling is redundant
        ([(10.0, "a")], [(10.0, "a"), (11.0, "a")], {}, (1, 0, 1, 0)),
    ],
)
def test_matched_mismatched_redundant_missed(reference, predicted, window, counts) -> None:
    assert outcome(match(reference, predicted, **window)) == counts


def test_shares_by_hand() -> None:
    right = match([(10.0, "a"), (20.0, "b c")], [(10.0, "a"), (20.0, "b c")])
    assert (right["precision"], right["recall"], right["f1"], right["jaccard"]) == (1, 1, 1, 1)
    assert (right["semantic_score"], right["distance_s"]) == (pytest.approx(1, abs=1e-6), 0)
    wrong = match(FAR_WORDS[0], [(10.0, FAR_WORDS[1])])
    assert (wrong["precision"], wrong["recall"], wrong["f1"]) == (0, 0, 0)
    assert (wrong["missing_rate"], wrong["redundant_rate"], wrong["semantic_score"]) == (0, 0, None)
    twice = match([(10.0, "a")], [(10.0, "a"), (11.0, "a")])
    assert (twice["precision"], twice["f1"], twice["redundant_rate"]) == (0.5, pytest.approx(2 / 3), 0.5)
    assert twice["pairs"] == [["c", 0, 0, pytest.approx(1, abs=1e-6)]]
    silent = match([(10.0, "a")], [])
    assert (silent["precision"], silent["recall"], silent["f1"], silent["missing_rate"]) == (None, 0, 0, 1)
    assert (match([], [(10.0, "a")])["recall"], match([], [])["f1"]) == (None, None)
    assert match_texts([], letters)["jaccard"] is None


def test_opposite_sentences_count_as_alike() -> None:
    """ProAssist takes the cosine's absolute value."""
    dialogue = Dialogue("c", [(1.0, "x")], [(1.0, "not x")])
    scores = match_texts([dialogue], lambda texts: np.float32([[-1.0 if "not" in t else 1.0, 0.0] for t in texts]))
    assert scores["matched"] == 1


def test_the_pairing_is_the_cheapest_as_a_whole() -> None:
    """The first text is nearer to the first reference, but only the second text has no other place."""
    scores = match([(10.0, "a b"), (13.0, "a")], [(10.0, "a"), (10.5, "a b")])
    assert [pair[1:3] for pair in scores["pairs"]] == [[0, 1], [1, 0]]
    alone = match([(10.0, "a b"), (13.0, "a")], [(10.0, "a")])  # 0.293 + 0 against 0 + 0.195
    assert [pair[1:3] for pair in alone["pairs"]] == [[0, 1]]


def test_texts_of_different_clips_never_meet_and_counts_are_pooled() -> None:
    clips = [
        Dialogue("a", [(1.0, "a")], []),
        Dialogue("b", [], [(1.0, "a")]),
        Dialogue("c", [(5.0, "b")], [(5.0, "b")]),
    ]
    scores = match_texts(clips, letters)
    assert outcome(scores) == (1, 0, 1, 1)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["jaccard"]) == (0.5, 0.5, 0.5, 1 / 3)


def test_order_of_clips_and_texts_changes_no_digit_and_no_pair() -> None:
    rng = np.random.default_rng(0)

    def talk() -> list[tuple[float, str]]:
        return [(float(at), str(rng.choice(list("abc")))) for at in rng.permutation(30)[:12]]  # many equal costs

    clips = [Dialogue(f"c{i}", talk(), talk()) for i in range(8)]
    other = [Dialogue(clip.clip_id, clip.reference[::-1], clip.predicted[::-1]) for clip in reversed(clips)]
    first, second = match_texts(clips, letters), match_texts(other, letters)
    assert first.pop("pairs") == [[clip, 11 - i, 11 - j, likeness] for clip, i, j, likeness in second.pop("pairs")]
    assert first == second
    assert 0 < first["matched"] < first["predictions"]


REFERENCE = {1: "b g", 2: "f", 5: "d a d", 11: "f", 13: "f a"}
PREDICTED = {0: "d", 3: "f", 4: "d a d c", 8: "f", 14: "g", 18: "h h a"}


def test_a_small_talk_is_scored_as_proassists_own_code_scores_it() -> None:
    """What its `find_match` (at 9d0b2b2; window -4..8 frames of half a second, factor 0.3) gave for these."""
    scores = match(*([(frame / 2, text) for frame, text in side.items()] for side in (REFERENCE, PREDICTED)))
    frames = [(list(PREDICTED)[i], list(REFERENCE)[j], likeness) for _, i, j, likeness in scores["pairs"]]
    assert frames == [(3, 2, pytest.approx(1)), (4, 5, pytest.approx(0.912871)), (8, 11, pytest.approx(1))]
    assert (scores["redundant"], scores["missed"]) == (3, 2)


def said(clip: Any, texts: dict[int, str] | None) -> Any:
    """A ScoredClip as far as this module looks at one; frames are absolute."""
    per_frame = None if texts is None else [texts.get(clip.start_frame + i) for i in range(clip.num_frames)]
    return SimpleNamespace(clip=clip, said=per_frame)


def test_references_are_assistant_turns_that_label_something() -> None:
    turns = [
        turn("system", "s", 100, 101),
        turn("user", "u", 104, 105),
        turn("assistant", "before", 90, 99),
        turn("assistant", "no frames"),
        turn("assistant", "empty", 105, 105),
        turn("assistant", "cut", 98, 102),
        turn("assistant", "last", 107, 120),
        turn("assistant", "after", 108, 110),
        turn("DST_UPDATE", "d", 103, 104),
    ]
    assert spoken(clip_example(turns, 100, 8)) == [(50.0, "cut"), (53.5, "last")]  # as in `events`
    assert spoken(clip_example(turns, 100, 8, positive="onset")) == [(53.5, "last")]


def test_the_instant_is_the_turns_time_and_cotimed_turns_are_one_text() -> None:
    turns = [
        Turn("assistant", "later", 6, 8, 3.3),
        Turn("assistant", "well done", 2, 4, 1.2),
        Turn("assistant", "now the wheel", 3, 5, 1.2),
    ]
    assert spoken(clip_example(turns)) == [(1.2, "well done now the wheel"), (3.3, "later")]


def test_live_clips_are_scored_at_the_time_of_their_frames() -> None:
    clip = clip_example([turn("assistant", "a b", 104, 105), turn("assistant", "c", 114, 116)], 100, 20)
    scores = dialogue_metrics([said(clip, {103: "a b", 119: "c"})], letters, early_s=4, late_s=2)
    assert outcome(scores) == (1, 0, 1, 1)  # the second comes 2.5 s late
    assert scores["distance_s"] == 0.5
    assert (scores["early_s"], scores["late_s"]) == (4, 2)
    assert "pairs" not in scores
    json.dumps(scores)
    assert outcome(dialogue_metrics([said(clip, {103: "a b", 119: "c"})], letters, 2, 4)) == (2, 0, 0, 0)


def test_an_empty_text_is_a_text_and_silence_is_none() -> None:
    clip = clip_example([turn("assistant", "a", 4, 5)])
    assert outcome(dialogue_metrics([said(clip, {6: ""})], letters, 4, 2)) == (0, 0, 1, 1)
    assert outcome(dialogue_metrics([said(clip, {})], letters, 4, 2)) == (0, 0, 0, 1)
    with pytest.raises(InputError, match=r"clip c0: .* --self-fed"):
        dialogue_metrics([said(clip_example(), None)], letters, 4, 2)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "put", "the", "base", "down", "wheel", "attach"]


def encoder_folder(folder: Path, pooling: dict[str, Any], most: int | None = 6, normalize: bool = True) -> Path:
    """A sentence-transformers folder with a random BERT of 2 layers, 16 wide."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=12).save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    files = {"modules": modules, "1_Pooling/config": pooling, "sentence_bert_config": {"max_seq_length": most}}
    for name, content in (files | {"config_sentence_transformers": {}}).items():
        (folder / f"{name}.json").parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}


def by_hand(folder: Path, ids: list[int], first_token: bool = False) -> np.ndarray:
    """One text's embedding, without padding or batch."""
    with torch.no_grad():
        hidden = BertModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0].numpy()
    vector = hidden[0] if first_token else hidden.mean(0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("pooling", "first_token"),
    [
        (MEAN, False),
        ({"pooling_mode": "mean"}, False),
        ({"pooling_mode_cls_token": True}, True),
        ({"pooling_mode": "cls"}, True),
    ],
)
def test_an_embedding_is_the_unit_mean_or_first_of_the_texts_own_tokens(
    tmp_path: Path, pooling: dict[str, Any], first_token: bool
) -> None:
    folder = encoder_folder(tmp_path, pooling)
    vectors = load_encoder(folder)(["put the base down", "wheel", ""])
    expected = [by_hand(folder, ids, first_token) for ids in ([2, 4, 5, 6, 7, 3], [2, 8, 3], [2, 3])]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert vectors.dtype == np.float32


def test_a_long_text_is_cut_to_the_models_length_or_the_tokenizers(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, MEAN, most=4, normalize=False)
    vectors = load_encoder(folder)(["put the base down", "put the"])
    np.testing.assert_allclose(vectors[0], by_hand(folder, [2, 4, 5, 3]), atol=1e-6)
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    (folder / "sentence_bert_config.json").unlink()
    vectors = load_encoder(folder)([" ".join(["put"] * 30), " ".join(["put"] * 10)])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)  # 12 tokens with the two around them


def test_more_than_a_batch_keeps_its_order(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path, MEAN))
    texts = [" ".join(WORDS[4 + (i >> bit) % 6] for bit in range(i % 4)) for i in range(150)]
    vectors = encoder(texts)
    for i in (0, 63, 64, 149):
        np.testing.assert_allclose(vectors[i], encoder([texts[i]])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", None, "expected a complete sentence-transformers folder"),
        ("modules.json", '[{"path": "", "type": "m.Transformer"}]', "after one transformer"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling pooling_mode_max_tokens"),
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case True"),
        ("model.safetensors", "not tensors", "could not be loaded"),
        ("model.safetensors", None, "could not be loaded"),
        ("config.json", "{}", "could not be loaded"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', "default prompt query"),
    ],
)
def test_a_folder_that_is_none_is_refused_in_one_line(
    tmp_path: Path, file: str, content: str | None, says: str
) -> None:
    folder = encoder_folder(tmp_path, MEAN)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=says) as refused:
        load_encoder(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_folder_without_some_weights_is_refused(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, MEAN)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"16 weights missing, encoder\.layer\.2"):
        load_encoder(folder)


@pytest.mark.skipif("PROSPECT_DST_ENCODER" not in os.environ, reason="PROSPECT_DST_ENCODER=FOLDER of all-MiniLM-L6-v2")
def test_a_real_encoder_gives_the_likeness_that_sentence_transformers_gives() -> None:
    """Cosines of all-MiniLM-L6-v2 by sentence-transformers 6.2.0."""
    encoder = load_encoder(Path(os.environ["PROSPECT_DST_ENCODER"]))
    texts = ["A boy is running.", "A boy is running fast.", "A cat is chasing the ball.", "Attach the wheel now."]
    vectors = encoder(texts)
    assert vectors[0] @ vectors[1:].T == pytest.approx(COSINES, abs=1e-5)


COSINES = [0.907905, 0.251697, 0.025256]
