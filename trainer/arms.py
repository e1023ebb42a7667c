"""The arms of a comparison: what each reads of the dialog state, and where its decision is read.

All arms share data, seeds, order, steps and loss balance, and differ in these columns alone. `silence` against `speak`
must come out equal, bit for bit (BCE(x, y) = BCE(-x, 1 - y)): a check of the harness that costs one arm.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import InputError


@dataclass(frozen=True)
class Arm:
    """`decides`: 'direct' (a head whose logit says speak), 'inverted' (a head whose logit says silence) or 'lm-eos' (no
    head: silence is the LM's END as the next token after the decision token, speech is any other)."""

    name: str
    description: str
    decides: str = "direct"
    dst_head: bool = True  # whether there is a DST head
    dst_text: str = "content"  # of a state update in the context: 'content', 'markers' (without content) or 'none'
    state: bool = True  # whether the prompt has the state at the window's start


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("silence", "one inverted head, no DST (ProAssist's head)", "inverted", False, "none", False),
        Arm("lm-eos", "no head: silence is the LM's END, no DST (ProAssist's default)", "lm-eos", False, "none", False),
        Arm("speak", "one direct head, no DST", "direct", False, "none", False),
        Arm("speak+dst-head", "second head for DST updates, no DST text", "direct", True, "none", False),
        Arm("speak+dst", "second head, DST text in the context, state in the prompt"),
        Arm("speak+markers", "as speak+dst, but the DST text carries no content", "direct", True, "markers", True),
    )
}  # fmt: skip


def find_arm(name: str) -> Arm:
    """The arm of that name; InputError, naming those there are."""
    if name not in ARMS:
        raise InputError(f"arm {name!r}: not known, expected one of {', '.join(ARMS)}")
    return ARMS[name]
