"""State updates as text: 'S1->complete, S2->start', what a model reads and writes.

A step id that would not read back as it is (a comma, outer white space, a leading quote, nothing at all) is written
as a JSON string: '"step 1, toy"->start'. Parsing is lenient, as models write what they like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final

from pipeline.schema import TRANSITIONS

Updates = tuple[tuple[str, str], ...]  # (step id, transition), in order
_AMBIGUOUS: Final = re.compile(r'^["\s]|,|\s$|^$')
_PIECE: Final = re.compile(r'(?:\s*"(?:[^"\\]|\\.)*"(?=\s*->)|[^,])[^,]*')  # a quoted id may hold commas


def write_updates(updates: Iterable[tuple[str, str]]) -> str:
    """The text of (step id, transition) pairs, in order."""
    return ", ".join(
        f"{json.dumps(step, ensure_ascii=False) if _AMBIGUOUS.search(step) else step}->{transition}"
        for step, transition in updates
    )


def parse_updates(text: str) -> Updates:
    """The (step id, transition) pairs that `write_updates` wrote; what reads as no update is left out."""
    updates = []
    for piece in _PIECE.findall(text):
        step, _, transition = (part.strip() for part in piece.rpartition("->"))
        if step and transition in TRANSITIONS:
            updates.append((_unquoted(step), transition))
    return tuple(updates)


def _unquoted(step: str) -> str:
    try:
        value = json.loads(step) if step.startswith('"') else step
    except ValueError:
        return step
    return str(value)
