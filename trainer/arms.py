"""The rungs of the ladder, and the arms among them: what is trained, what it reads, and where its decision is read.

All arms share data, seeds, order, steps and loss balance, and differ in the columns of `ARMS` alone. `silence` against
`speak` must come out equal, bit for bit (BCE(x, y) = BCE(-x, 1 - y)): a check of the harness that costs one arm.
A rung adds one source of information to the rung `below` it. Most rungs are arms; controls have no model, and a
scripted rung evaluates the checkpoint of another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import InputError


@dataclass(frozen=True)
class Arm:
    """`decides`: 'direct' (a head whose logit says speak), 'inverted' (a head whose logit says silence), 'lm-eos' (no
    head: silence is the LM's END as the next token after the decision token, speech is any other) or 'token' (no head:
    the LM's next token among three says silence, speak or update: `Tokens.choices`)."""

    name: str
    description: str
    decides: str = "direct"
    dst_head: bool = True  # whether it decides on DST updates, too
    dst_text: str = "content"  # of a state update in the context: 'content', 'markers' (without content) or 'none'
    state: bool = True  # whether the prompt has the state at the window's start
    images: bool = True  # whether it sees the frames; without, each of them is the same grey picture
    texts: bool = True  # whether user and assistant texts are in the context; the prompt is there in any case


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("silence", "one inverted head, no DST (ProAssist's head)", "inverted", False, "none", False),
        Arm("lm-eos", "no head: silence is the LM's END, no DST (ProAssist's default)", "lm-eos", False, "none", False),
        Arm("texts", "as speak, but every frame is grey", "direct", False, "none", False, images=False),
        Arm("frames", "as speak, but no texts in the context", "direct", False, "none", False, texts=False),
        Arm("speak", "one direct head, no DST", "direct", False, "none", False),
        Arm("speak+dst-head", "second head for DST updates, no DST text", "direct", True, "none", False),
        Arm("speak+dst", "second head, DST text in the context, state in the prompt"),
        Arm("speak+markers", "as speak+dst, but the DST text carries no content", "direct", True, "markers", True),
        Arm("token", "as speak+dst, without heads: the LM's next token says silence, speak or update", "token"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """`kind`: 'control' (no model: `trainer.controls`), 'arm' (trained: ARMS) or 'scripted' (the checkpoint of the rung
    below it, the reference's updates instead of its own). Names are folder names and values of options."""

    name: str
    kind: str
    uses: str  # what it can tell from when to speak
    below: str | None  # the rung that it is compared with, which has one source of information less
    default: bool = True  # in a night's ladder
    label: str = ""  # in tables and figures, where the name is not clear


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("metronome", "control", "the clock", None),
        Rung("history", "control", "its own past events, and when the user spoke", "metronome"),
        Rung("texts", "arm", "all texts, no pictures", "history"),
        Rung("frames", "arm", "pictures, no texts", "metronome", default=False),
        Rung("speak", "arm", "pictures and texts", "texts"),
        Rung("speak+markers", "arm", "that the state changed, not what changed", "speak"),
        Rung("speak+dst-head", "arm", "a second head's labels in training", "speak", default=False),
        Rung("speak+dst", "arm", "the state that it keeps by itself", "speak"),
        Rung("true-state", "scripted", "the reference's state", "speak+dst", label="speak+dst, true state"),
        Rung("token", "arm", "what speak+dst uses, decided by the LM's next token", "speak+dst", default=False),
        Rung("silence", "arm", "what speak uses, decided by an inverted head", "speak", default=False),
        Rung("lm-eos", "arm", "what speak uses, decided by the LM's END", "speak", default=False),
    )
}
DEFAULT_RUNGS: tuple[str, ...] = tuple(rung.name for rung in RUNGS.values() if rung.default)


def find_arm(name: str) -> Arm:
    """The arm of that name; InputError, naming those there are."""
    if name not in ARMS:
        raise InputError(f"arm {name!r}: not known, expected one of {', '.join(ARMS)}")
    return ARMS[name]
