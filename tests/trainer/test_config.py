from __future__ import annotations

import pytest

from pipeline.errors import InputError
from trainer.config import TrainConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"balance": "some"}, "balance is 'some', expected one of none, mean"),
        ({"warmup_steps": 300}, "warmup_steps 300 > steps 200"),
        ({"tokens_per_frame": 3}, "expected a square number"),
        ({"arm": "loud"}, r"arm 'loud': not known, expected one of silence, lm-eos, texts, "),
        ({"freeze": ("eyes",)}, "freeze names eyes; expected some of vision, connector, text"),
        ({"freeze": ("text",), "lora_rank": 4}, "lora_rank is 4 and text is in freeze"),
        ({"lr_by_part": {"heads": -1e-3}}, "lr_by_part heads is -0.001, expected above 0"),
        ({"freeze": ("text",), "lr_by_part": {"text": 0.1}}, "text is in lr_by_part and in freeze"),
    ],
)
def test_fields_that_disagree_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**wrong)
