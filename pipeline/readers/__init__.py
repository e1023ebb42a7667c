"""The input schemas, a module each, and which of them a clip is written in. How to add one: docs/add-a-reader.md."""

from __future__ import annotations

from typing import Final

import msgspec

from pipeline.readers import egoproactive, proassist, prospect, streamo
from pipeline.readers.clip import Clip, ClipError, Reader, brief, checked
from pipeline.readers.index import NOT_STRICT, lenient

# the first that fits
READERS: Final[tuple[Reader, ...]] = (egoproactive.READER, streamo.READER, proassist.READER, prospect.READER)

# files of the same projects that cannot be used: the field that they have for a conversation, and what to use instead
_UNUSABLE: Final = {
    "events": (
        "events without a conversation (their times are gone)",
        "a conversation; use the {split}.json beside it with --fps 2, or the newest sparse_sequence_generator",
    ),
    "conversations": (
        "conversations (generated dialogs; no frames were made)",
        "one conversation with frames; run the generator's next stage and use its {split}_training.json",
    ),
    "messages": ("messages (a chat that was made for one model)", "the raw file that it was converted from"),
}


def decode(raw: bytes, fps: float | None = None) -> Clip:
    """The clip of one clip's JSON bytes, whatever its schema; fps: of clips that do not say. Raises ClipError."""
    try:
        record = prospect.RECORD.decode(raw)  # most files: decoded once, without a look at the names
    except NOT_STRICT:
        return checked(_reader(raw).read(raw, fps))
    return checked(prospect.clip_in(record, fps))


def _reader(raw: bytes) -> Reader:
    try:
        names = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).keys()
    except NOT_STRICT:
        tree = lenient(raw)
        if not isinstance(tree, dict):
            raise ClipError("clip", type(tree).__name__, "object") from None
        names = tree.keys()
    for name, (found, expected) in _UNUSABLE.items():
        if name in names and "conversation" not in names:
            raise ClipError("conversation", found, expected)
    for reader in READERS:
        if reader.recognises(names, raw):
            return reader
    known = "; ".join(f"{reader.name}: {reader.needs}" for reader in READERS)
    raise ClipError("clip", f"the fields {brief(', '.join(sorted(names)))}", f"one of the schemas {known}")
