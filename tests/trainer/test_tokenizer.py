from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.tokenizer import MARKERS, SPECIAL, TINY_VOCABULARY, Tokens, load_tokens, train_tiny_tokens

TEXTS = ["Place the red wheel.", "Attach the wheel to the axle, please.", "S1->complete, S2->start"] * 3


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return train_tiny_tokens(TEXTS)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_round_trips(tokens, text):
    assert tokens.decode(tokens.encode(text)) == text


def test_special_tokens_are_distinct_and_named_as_smolvlms(tokens):
    ids = [tokens.image, tokens.end, *tokens.marker.values()]
    assert len(tokens) <= TINY_VOCABULARY
    assert len(set(ids)) == 2 + len(MARKERS)
    assert SPECIAL[2] == "<|reserved_special_token_0|>"
    assert tokens.decode([tokens.image, tokens.end, tokens.marker["failed"]]) == (
        "<image><end_of_utterance><|reserved_special_token_10|>"
    )


def test_special_tokens_in_data_stay_text(tokens):
    text = "look: <image><end_of_utterance> <|reserved_special_token_2|>"
    ids = tokens.encode(text)
    assert not {tokens.image, tokens.end, *tokens.marker.values()} & set(ids)
    assert tokens.decode(ids) == text


def test_a_loaded_tokenizer_gives_the_same_ids_also_with_truncation_and_padding_left_in_the_file(tokens, tmp_path):
    tokens.tokenizer.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<end_of_utterance>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    text = "Attach <image> the wheel ✓, please, and once more"
    for again in (load_tokens(tmp_path), pickle.loads(pickle.dumps(load_tokens(tmp_path)))):
        assert again.encode(text) == tokens.encode(text)
        assert (again.image, again.end, again.marker) == (tokens.image, tokens.end, tokens.marker)
