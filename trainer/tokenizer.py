"""Text -> ids, and the markers around it. Ids are looked up by string, never through eos_token or pad_token.

SmolVLM has 88 `<|reserved_special_token_i|>` without a meaning; roles and states take the first eleven, so no
vocabulary is resized. The order of MARKERS is a file format. Special tokens are never parsed out of data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pipeline.errors import InputError
from pipeline.schema import STATES
from trainer.hub import loading

IMAGE, END = "<image>", "<end_of_utterance>"
MARKERS = ("system", "user", "assistant", "DST_UPDATE", "step", *STATES)
SPECIAL = (IMAGE, END, *(f"<|reserved_special_token_{i}|>" for i in range(len(MARKERS))))
TINY_VOCABULARY = 1024


class Tokens:
    """A tokenizer with the special ids that a sequence needs; InputError where one is missing."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer: Any = tokenizer
        tokenizer.backend_tokenizer.encode_special_tokens = True  # "<image>" in a text is just text
        ids = [tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL]
        if None in ids:
            raise InputError(f"tokenizer: no token {SPECIAL[ids.index(None)]}; choose another --model, a SmolVLM")
        self.image, self.end, *markers = ids
        self.marker = dict(zip(MARKERS, markers, strict=True))
        # what says silence, speech and an update as the token after a frame: END, and what the two texts begin with
        self.choices = self.end, self.marker["assistant"], self.marker["DST_UPDATE"]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens, (self.tokenizer,)  # to a worker, encode_special_tokens would be lost

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def load_tokens(name: str | Path) -> Tokens:
    """The tokenizer of a folder or of a model on the hub. Truncation and padding that a tool left in it are off."""
    with loading(name, "tokenizer") as where:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **where)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return Tokens(tokenizer)


def train_tiny_tokens(texts: Iterable[str]) -> Tokens:
    """A byte-level BPE of at most TINY_VOCABULARY tokens; any text round-trips; same texts, same ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
