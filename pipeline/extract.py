"""Pass 1: `extract` decodes, checks and spools the clips of a part; `resolve` decides what only the whole input can.

The spool holds texts and turns for pass 2, as Arrow; in memory stays 1 kB a clip. Costs one typed decode of the JSON
and some 3 us a turn. Decided are unique ids, each file's frame convention, bounds, padding and initial states; a clip
that cannot stay is refused like a malformed one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import operator
import os
import re
import secrets
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import labels
from pipeline.dataset import flat_lists
from pipeline.errors import InputError
from pipeline.options import Options
from pipeline.readers import decode
from pipeline.readers.clip import EVERYWHERE, MAX_FRAME, MAX_FRAMES, Clip, ClipError, Range, check_bounds
from pipeline.readers.index import NOT_STRICT
from pipeline.schema import CLIPS, ROLES, STATES
from pipeline.state import Segment, contradicts, lacks, states_before

GROUP_CLIPS: Final = 256
GROUP_BYTES: Final = 64 << 20

_AS_STORED = "video_uid recording_id dataset clip_idx fps frames_file goal knowledge steps neg_rate"
_FRAMES = ("start_frame", "end_frame")  # int64 in the spool, as the source has them
_SPOOL_TYPES: Final = {"role": pa.int8(), "start_frame": pa.int64(), "end_frame": pa.int64()}  # role: index in ROLES
_TURN = pa.struct([f.with_type(_SPOOL_TYPES.get(f.name, f.type)) for f in CLIPS.field("turns").type.value_type])
SPOOL: Final = pa.schema(
    {
        **{name: CLIPS.field(name).type for name in _AS_STORED.split()},
        "unlabelled": pa.list_(pa.struct([(name, pa.int64()) for name in _FRAMES])),
        "convention": pa.string(),  # null: as in the rest of the file
        "summaries": pa.int32(),
        "turns": pa.list_(_TURN),
    }
)
ECHO_BYTES: Final = 20  # a shorter text ("yes") is repeated by chance
_ANY_STATE: Final = re.compile(rf":\s*(?:{'|'.join(STATES)})\b")  # a quick look before
_STEP_STATE: Final = re.compile(rf"(\S+)\s*:\s*({'|'.join(STATES)})\b")
_ROLE_CODES: Final = {role: code for code, role in enumerate(ROLES)}
Refused = list[tuple[int, ClipError, Range, str | None]]  # number in the file, why, bytes, id


def extract(
    spool: str, path: str, spans: np.ndarray, first: int, fps: float | None, recording: str
) -> tuple[list[Clip], Refused]:
    """Decode and check the clips of a part of a file, which lie at `spans` (int64 [C, 2]); spool and return the good.

    first: number of the part's first clip in the file; fps: --fps; recording: the pattern of recording_id. The spool is
    renamed into place, so that two tries of one part, of which a cluster lost one, do not meet.
    """
    pattern, new = re.compile(recording), Path(f"{spool}.{secrets.token_hex(4)}")
    kept: list[Clip] = []
    refused: Refused = []
    gc.disable()  # clips hold no cycles: looking for some only costs; `preprocess` enables it again
    with open(path, "rb") as file, pa.ipc.new_file(new, SPOOL) as writer:
        for begin, stop in cut(spans[:, 1] - spans[:, 0], GROUP_CLIPS, GROUP_BYTES):
            clips = []
            for number, (start, end) in enumerate(spans[begin:stop].tolist(), first + begin):
                raw = os.pread(file.fileno(), end - start, start)
                try:
                    clip = decode(raw, fps)
                except ClipError as error:
                    own_id = None  # where it can be read
                    with contextlib.suppress(*NOT_STRICT):
                        own_id = msgspec.json.decode(raw, type=dict).get("id")
                    refused.append((number, error, (start, end), None if own_id is None else str(own_id)))
                    continue
                match = pattern.search(clip.video_uid)
                take = match and (match[1] if pattern.groups else match[0])
                clip.number, clip.span, clip.recording_id = number, (start, end), take or clip.video_uid
                clips.append(clip)
            batch = _spooled(clips)
            writer.write_batch(batch)
            at, turns = flat_lists(batch.column("turns"))
            owner = np.repeat(np.arange(len(clips)), np.diff(at))
            _describe(clips, turns, at, owner)
            _measure(clips, turns, owner)
            kept += clips
    new.rename(spool)
    return kept, refused


def cut(sizes: Sequence[int] | np.ndarray, most: int, total: int) -> Iterator[Range]:
    """Ranges of consecutive items: at most `most` of them and, beyond a single one, of `total` size."""
    begin, used = 0, 0
    for i, size in enumerate(np.asarray(sizes).tolist()):
        if i > begin and (i - begin >= most or used + size > total):
            yield begin, i
            begin, used = i, 0
        used += size
    if len(sizes):
        yield begin, len(sizes)


def _spooled(clips: list[Clip]) -> pa.RecordBatch:
    """The clips as Arrow. Their turns become arrays over all clips: Arrow takes nested lists ten times slower."""
    flat = [list(chain.from_iterable(part)) for part in zip(*[clip.turns for clip in clips], strict=True)]
    roles, contents, time, start, end = flat or [[]] * 5
    role = np.fromiter(map(_ROLE_CODES.__getitem__, roles), np.int8, len(roles))
    words, is_update = np.fromiter(contents, object, len(roles)), role == ROLES.index("DST_UPDATE")
    changes = words[is_update]
    words[is_update] = None
    sizes = np.zeros(len(roles) + 1, np.int32)
    sizes[1:][is_update] = list(map(len, changes))
    updates = list(chain.from_iterable(changes))
    ids, transitions = (
        pa.array(list(map(str, map(operator.attrgetter(name), updates))), pa.string()) for name in ("id", "transition")
    )
    offsets = pa.array(np.cumsum(sizes, dtype=np.int32))
    pairs = pa.StructArray.from_arrays([ids, transitions], fields=[*_TURN.field("updates").type.value_type])
    each = pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise(ids, transitions, "->"))
    columns = [
        pa.array(role),
        pc.coalesce(pa.array(words, pa.string()), pc.binary_join(each, ", ")),  # 'S1->complete, S2->start'
        *(pa.array(column, pa.int64()) for column in (start, end)),
        pa.array(time, pa.float64()),
        pa.ListArray.from_arrays(offsets, pairs, type=_TURN.field("updates").type),
    ]
    turns = pa.StructArray.from_arrays(columns, fields=list(_TURN))
    offsets = pa.array(np.cumsum([0, *(len(clip.turns[0]) for clip in clips)], dtype=np.int32))
    values = {
        "dataset": [clip.dataset or "unknown" for clip in clips],
        "clip_idx": [clip.clip_idx or 0 for clip in clips],
        "turns": pa.ListArray.from_arrays(offsets, turns, type=SPOOL.field("turns").type),
    }
    for name in set(SPOOL.names) - set(values):
        values[name] = list(map(operator.attrgetter(name), clips))
    return pa.RecordBatch.from_pydict(values, SPOOL)


def _describe(clips: list[Clip], turns: pa.StructArray, at: np.ndarray, owner: np.ndarray) -> None:
    """Give each clip its id and what its turns tell (state, updates, echoes), and take the turns away.

    turns [T] of all clips; at [C + 1]: where each clip's begin; owner [T]: each turn's clip. The id is the clip's own,
    else its video, number, user and a digest of its conversation: of the clip alone, so that only duplicates share it.
    """
    role, text, echoed = turns.field("role").to_numpy(), turns.field("text"), _echoes(clips, turns, owner)
    start, end = (turns.field(name).fill_null(none) for name, none in zip(_FRAMES, labels.NO_FRAMES, strict=True))
    time = turns.field("time_s").fill_null(np.nan).to_numpy().view(np.int64)
    numbers = np.stack([role, start, end, time, pc.binary_length(text)], axis=1, dtype=np.int64)
    texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(at), text), "")
    system, is_update = (role == ROLES.index(name) for name in ("system", "DST_UPDATE"))
    system_states: list[dict[str, str]] = [{} for _ in clips]  # the states that system turns name
    for i, words in zip(owner[system].tolist(), text.filter(pa.array(system)).to_pylist(), strict=True):
        if _ANY_STATE.search(words):
            system_states[i].update(_STEP_STATE.findall(words))
    tracked = np.bincount(owner[is_update], minlength=len(clips)).tolist()
    first, updates = flat_lists(turns.field("updates"))
    frames = np.repeat(numbers[:, 1:3], np.diff(first), axis=0).T.tolist()
    changes = list(zip(*frames, *(column.to_pylist() for column in updates.flatten()), strict=True))
    for i, (clip, (begin, stop)) in enumerate(zip(clips, pairwise(first[at].tolist()), strict=True)):
        clip.clip_id = str(clip.id)
        if clip.id is None:
            bounds = f"{clip.start_frame} {clip.end_frame}".encode()
            digest = hashlib.sha256(b"".join((numbers[at[i] : at[i + 1]].tobytes(), texts[i].as_buffer(), bounds)))
            parts = (clip.video_uid, clip.clip_idx, clip.user, digest.hexdigest()[:8])
            clip.clip_id = "_".join(str(part) for part in parts if part is not None)
        clip.updates, clip.tracked = msgspec.msgpack.encode(changes[begin:stop]), bool(clip.steps or tracked[i])
        if clip.initial_state or system_states[i]:
            own = [update[2:] for update in changes[begin:stop]]
            clip.contradicted = bool(clip.initial_state) and contradicts(clip.initial_state or {}, own)
            clip.system_contradicted = bool(system_states[i]) and contradicts(system_states[i], own)
        clip.turns, clip.goal, clip.knowledge, clip.steps, clip.echoed = (), None, None, (), echoed[i]
        clip.unlabelled = EVERYWHERE if tuple(clip.unlabelled) == EVERYWHERE else ()


def _echoes(clips: list[Clip], turns: pa.StructArray, owner: np.ndarray) -> list[tuple[int, int]]:
    """Per clip (assistant turns whose whole text stands in an earlier user turn, of how many)."""
    role, size = turns.field("role").to_numpy(), pc.utf8_length(turns.field("text")).to_numpy()
    user, assistant = (role == ROLES.index(name) for name in ("user", "assistant"))
    longest, echoed = np.zeros((2, len(clips)), np.int64)  # user turn, count
    np.maximum.at(longest, owner[user], size[user])
    for i in set(owner[assistant & (size >= ECHO_BYTES) & (size <= longest[owner])].tolist()):
        heard: list[str] = []
        for who, text in zip(*clips[i].turns[:2], strict=True):
            if who == "user":
                heard.append(text)
            elif who == "assistant" and len(text) >= ECHO_BYTES:
                echoed[i] += any(text in earlier for earlier in heard)
    return list(zip(echoed.tolist(), np.bincount(owner[assistant], minlength=len(clips)).tolist(), strict=True))


def _measure(clips: list[Clip], turns: pa.StructArray, owner: np.ndarray) -> None:
    """The clips' extents, and how their turns [T] vote on the file's convention; owner [T]: each turn's clip."""
    start, end, time = (turns.field(name).to_numpy(zero_copy_only=False) for name in (*_FRAMES, "time_s"))
    role = turns.field("role").to_numpy()
    framed = (role != ROLES.index("system")) & turns.field("end_frame").is_valid().to_numpy(zero_copy_only=False)

    def extents(which: np.ndarray, low: np.ndarray) -> list[Range]:
        first, last = np.full(len(clips), np.iinfo(np.int64).max), np.full(len(clips), -1)
        np.minimum.at(first, owner[which], low[which].astype(np.int64))
        np.maximum.at(last, owner[which], end[which].astype(np.int64))
        return list(zip(np.where(last == -1, -1, first).tolist(), last.tolist(), strict=True))

    columns = extents(framed, start), extents(framed & (role == ROLES.index("DST_UPDATE")), start), extents(framed, end)
    for clip, extent, dst_extent, of_ends in zip(clips, *columns, strict=True):
        clip.extent, clip.dst_extent, clip.first_end = extent, dst_extent, of_ends[0]
        clip.unbounded = clip.given == (0, 0) and dst_extent[1] < 0 < extent[1]
    voting = framed & ~np.isnan(time) & np.array([not clip.convention for clip in clips], bool)[owner]
    firsts = [  # bounds that are the DST turns' may leave turns out
        clip.extent[0]
        if clip.unbounded or clip.start_frame is None or clip.given == clip.dst_extent
        else clip.start_frame
        for clip in clips
    ]
    start, end, owner = start[voting].astype(np.int64), end[voting].astype(np.int64), owner[voting]
    frame = time[voting] * np.array([clip.fps for clip in clips])[owner]
    votes = labels.vote(owner, start, end, frame, np.array(firsts, np.int64))
    for clip, counts in zip(clips, votes.tolist(), strict=True):
        clip.votes = counts


@dataclass
class Source:
    """One input file and what is learned of it."""

    path: Path
    split: str
    bytes: int
    sha256: str = ""
    convention: str = "event"
    votes: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # turns; of those, lead-in, event, window
    counts: Counter[str] = field(default_factory=Counter)  # of clips: renamed, bounds_widened
    refused: list[dict[str, Any]] = field(default_factory=list)  # lines of quarantine.jsonl
    parts: dict[str, list[Clip]] = field(default_factory=dict)  # by the spool that holds their turns

    def kept(self) -> list[Clip]:
        return [clip for part in self.parts.values() for clip in part if clip.keep]

    def refuse(self, clip: int | None, error: ClipError, span: Range, clip_id: str | None = None) -> None:
        """Add a line of quarantine.jsonl: where, found, expected. `clip` counts the file's clips from 0."""
        numbers = {"clip": clip, "turn": error.turn}
        where = " ".join([str(self.path), *(f"{name} {n}" for name, n in numbers.items() if n is not None)])
        line = {"file": str(self.path), "clip": clip, "clip_id": clip_id, **asdict(error)}
        line |= {"byte_start": span[0], "byte_end": span[1], "split": self.split}
        line["message"] = f"{where}: {error.field}: found {error.found}, expected {error.expected}"
        self.refused.append(line)

    def drop(self, clip: Clip, error: ClipError) -> None:
        clip.keep = False
        self.refuse(clip.number, error, clip.span, clip.clip_id)

    def manifest_entry(self) -> dict[str, Any]:
        """What the manifest says of this file, and so the report."""
        turns, *fits = self.votes
        clips = [clip for part in self.parts.values() for clip in part]
        ignored = Counter(name for clip in clips for name in set(clip.ignored))  # descriptive field -> clips
        schemas = Counter(clip.schema for clip in self.kept())
        return {
            "path": str(self.path),
            "split": self.split,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "clips": len(self.kept()),
            "quarantined": len(self.refused),
            "schemas": dict(sorted(schemas.items())),
            "frame_convention": self.convention,
            "votes": {"turns": turns, **dict(zip(labels.VOTED, fits, strict=True))},
            "turns_not_fitting": turns - fits[labels.VOTED.index(self.convention)],
            "fps_assumed": sum(not clip.fps_given for clip in clips),
            **{name: self.counts[name] for name in ("bounds_widened", "renamed")},
            "ignored_fields": dict(sorted(ignored.items())),
        }


def resolve(sources: list[Source], options: Options) -> None:
    """Decide on all clips. Raises InputError where no frame convention fits a file."""
    taken: dict[tuple[str, str], Clip] = {}
    for source in sources:
        _unique_ids(source, taken)
        _decide_convention(source, options.frame_convention)
        _decide_bounds(source, options.bounds)
        _replay_states(source)
    if options.pad_s:
        _pad([clip for source in sources for clip in source.kept()], options)


def _unique_ids(source: Source, taken: dict[tuple[str, str], Clip]) -> None:
    """Of clips of one data set with one id in one split, the first is kept; one of another data set is renamed."""
    for clip in source.kept():
        first = taken.setdefault((source.split, clip.clip_id), clip)
        if first is clip:
            continue
        longer = f"{clip.clip_id}_{clip.dataset or 'unknown'}_{clip.video_uid}"
        if first.dataset == clip.dataset or (source.split, longer) in taken:
            source.drop(clip, ClipError("clip_id", f"{clip.clip_id!r} a second time", "an id of its own"))
        else:
            taken[source.split, longer] = clip
            clip.clip_id = longer
            source.counts["renamed"] += 1


def _decide_convention(source: Source, given: str | None) -> None:
    """Let the file's valid clips vote on how start_frame and end_frame are meant."""
    voters = []
    for clip in source.kept():
        start, end = _given_or(clip, clip.extent)
        # Only bounds that are right in one convention at least; `window` adds a frame at the end.
        if end - start + (clip.end_frame is None) > 0 and end - start <= MAX_FRAMES:
            voters.append(clip.votes)
    source.votes = np.array(voters, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    turns, lead_in, event, window = source.votes
    if (decided := given or labels.decide(source.votes)) is None:
        raise InputError(
            f"{source.path}: found no frame convention that 90% of its {turns} timed turns follow (votes: "
            f"lead-in {lead_in}, event {event}, window {window}); say which it is with --frame-convention"
        )
    own = {clip.convention for clip in source.kept()}
    source.convention = (own.pop() if len(own) == 1 else None) or decided  # the reader's, where it placed all turns


def _given_or(clip: Clip, extent: Range) -> Range:
    """The clip's bounds as given, or from `extent` what is not given."""
    start, end = (None, None) if clip.unbounded else clip.given
    return extent[0] if start is None else start, extent[1] if end is None else end


def _decide_bounds(source: Source, bounds: str) -> None:
    """Bounds from the clips, or from their turns where missing or where the file's span DST updates alone.

    The latter where 90% of the clips with bounds have just that extent, and some other turn lies outside.
    """
    clips = source.kept()
    voters = [clip for clip in clips if not clip.convention and None not in clip.given]
    spans_dst = [clip for clip in voters if clip.unbounded or clip.given == clip.dst_extent]
    outside = any(clip.given != clip.extent for clip in spans_dst)
    widen = bounds == "auto" and outside and len(spans_dst) >= labels.AGREEMENT * len(voters)
    for clip in clips:
        first, last = clip.extent
        if source.convention == "lead-in" and not clip.convention:  # the event of an empty range lies before it
            first = min(first, max(clip.first_end - 1, 0))
            last = max(last, first + 1)
        start, end = _given_or(clip, (first, last))
        if clip.extent[1] >= 0 and not clip.convention and (widen or bounds == "turns"):
            start, end = (first, last) if bounds == "turns" else (min(start, first), max(end, last))
        changed = None not in clip.given and (start, end) != clip.given
        clip.bounds = (start, end + (source.convention == "window" and not clip.convention))
        try:
            check_bounds(*clip.bounds)
            source.counts["bounds_widened"] += changed
        except ClipError as error:
            source.drop(clip, error)


def _replay_states(source: Source) -> None:
    """Replay the state before each clip of a file over the earlier clips of its conversation.

    Where there are none, the given state stays, unless the clip's own updates contradict it.
    """
    conversations: dict[tuple[str | None, ...], list[Clip]] = {}
    for clip in source.kept():
        if clip.tracked:
            conversations.setdefault((clip.dataset, clip.video_uid, clip.user), []).append(clip)
    for group in (group for members in conversations.values() for group in _tell_apart(members)):
        if len(group) == 1:
            group[0].state = {} if group[0].contradicted else None
            continue
        segments = []
        for clip in group:
            lead_in = source.convention == "lead-in" and not clip.convention
            first = max(clip.first_end - 1, 0) if lead_in else clip.extent[0]
            updates = [
                (max(end - 1, 0) if lead_in else start, step, transition)
                for start, end, step, transition in msgspec.msgpack.decode(clip.updates)
                if end != labels.NO_FRAMES[1]
            ]
            given = None if clip.contradicted else clip.initial_state
            segments.append(Segment(clip.bounds[0] if clip.extent[1] < 0 else first, updates, given))
        for clip, segment, state in zip(group, segments, states_before(segments), strict=True):
            clip.state, clip.lacks_updates = state, lacks(state, [update[1:] for update in segment.updates])


def _tell_apart(members: list[Clip]) -> Iterator[list[Clip]]:
    """The conversations among clips of one video and user: one, but generators write several without telling them
    apart: where a clip_idx comes twice, one that does not rise begins the next."""
    numbers = [clip.clip_idx for clip in members]
    begin = 0
    if len(set(numbers)) < len(numbers) and set(numbers) != {None}:
        for i, (before, number) in enumerate(pairwise(numbers), 1):
            if before is None or number is None or number <= before:
                yield members[begin:i]
                begin = i
    yield members[begin:]


def _pad(clips: list[Clip], options: Options) -> None:
    """Widen clips by pad_s on both sides, up to frame 0, the frames on disk, and clips wholly before or after."""
    from pipeline.media import count_frames, find_frames

    videos: dict[str, list[Clip]] = {}
    for clip in clips:
        videos.setdefault(clip.video_uid, []).append(clip)
    for members in videos.values():
        starts, ends = (sorted(bounds) for bounds in zip(*(clip.bounds for clip in members), strict=True))
        one, root, on_disk = members[0], options.frames_root, None  # frames on disk
        if root and (path := find_frames(Path(root), one.video_uid, one.frames_file, one.dataset)):
            on_disk, _ = count_frames(path, one.fps)
        for clip in members:
            start, end = clip.bounds
            pad = int(options.pad_s * clip.fps + labels.FLOOR_TOLERANCE)
            before, after = bisect_right(ends, start), bisect_left(starts, end)
            first = max(0, start - pad, *ends[before - 1 : before])
            last = min(MAX_FRAME if on_disk is None else on_disk, end + pad, *starts[after : after + 1])
            clip.bounds = first, max(end, last)
