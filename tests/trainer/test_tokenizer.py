from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pipeline.errors import InputError
from trainer.tokenizer import MARKERS, TINY_VOCABULARY, Tokens, load_tokens, marker_token, train_tiny_tokens

TEXTS = ["Place the red wheel.", "Attach the wheel to the axle, please.", "S1->complete, S2->start"] * 3


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return train_tiny_tokens(TEXTS)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_round_trips(tokens, text):
    assert tokens.decode(tokens.encode(text)) == text


def test_training_is_deterministic_and_small(tokens):
    again = train_tiny_tokens(iter(TEXTS))
    assert again.tokenizer.get_vocab() == tokens.tokenizer.get_vocab()
    assert len(tokens) <= TINY_VOCABULARY
    assert len(train_tiny_tokens(f"{i} {i * 7919}" for i in range(5000))) <= TINY_VOCABULARY


def test_special_tokens_are_distinct_and_named_as_smolvlms(tokens):
    ids = [tokens.image, tokens.end, *tokens.marker.values()]
    assert len(set(ids)) == 2 + len(MARKERS)
    assert marker_token("system") == "<|reserved_special_token_0|>"
    assert tokens.decode([tokens.image, tokens.end, tokens.marker["failed"]]) == (
        "<image><end_of_utterance><|reserved_special_token_10|>"
    )


def test_special_tokens_in_data_stay_text(tokens):
    text = "look: <image><end_of_utterance> <|reserved_special_token_2|>"
    ids = tokens.encode(text)
    assert not {tokens.image, tokens.end, *tokens.marker.values()} & set(ids)
    assert tokens.decode(ids) == text


def test_save_and_load_give_the_same_ids(tokens, tmp_path):
    tokens.save(tmp_path)
    again = load_tokens(tmp_path)
    text = "Attach <image> the wheel ✓"
    assert again.encode(text) == tokens.encode(text)
    assert (again.image, again.end, again.marker) == (tokens.image, tokens.end, tokens.marker)


def test_a_tokenizer_without_smolvlms_tokens_is_refused():
    with pytest.raises(InputError, match="no token <image>, expected a SmolVLM's"):
        Tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())))


def test_truncation_and_padding_that_a_tool_left_in_the_file_are_off(tokens, tmp_path):
    tokens.save(tmp_path)
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<end_of_utterance>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    assert load_tokens(tmp_path).encode(TEXTS[1]) == tokens.encode(TEXTS[1])
    assert pickle.loads(pickle.dumps(load_tokens(tmp_path))).encode(TEXTS[1]) == tokens.encode(TEXTS[1])
