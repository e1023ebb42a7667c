"""EgoProactive's metrics: in which chunks of a session does the system speak, and in which should it?

A chunk is `$interrupt$TEXT` or `$silent$`. A scored clip is turned into such answers (a chunk is an interrupt where a
speaking event fires in it), so a run, a scores file and a submission are counted by the same code. The rules are those
of the official scorer (`score_proactive` in starter_kit/run_evaluation.py of `facebook/wearable-ai`): counts pooled
over all chunks, 0 where a ratio is undefined, chunks without a prediction left out and counted. It has no intervals;
ours draw recordings again.

    N chunks of a session    S sessions    R recordings    B draws
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.labels import FLOOR_TOLERANCE, SPEAK
from pipeline.storage import write_text
from trainer.evaluation.bootstrap import draw_recordings, interval_of
from trainer.evaluation.event_metrics import predicted_frames
from trainer.evaluation.scores import Floats, Ints, ScoredClip

INTERRUPT, SILENT = "$interrupt$", "$silent$"
COUNTS: Final = ("tp", "fp", "tn", "fn")  # interrupt is the positive class
DECIMALS: Final = 4  # as the official scorer prints


@dataclass(frozen=True)
class Session:
    """One line of a sessions file."""

    where: str  # for messages: file, line, video
    video_path: str
    task: str
    query: str | None
    intervals: tuple[tuple[float, float], ...]  # [N] [start, end) in seconds, ascending; empty where not given
    answers: tuple[str, ...]  # [N] the reference


# ---- files -------------------------------------------------------------------------------------------


def is_interrupt(answer: str) -> bool:
    """Whether the answer starts with `$interrupt$` after leading white space; anything else is silence."""
    return answer.lstrip().startswith(INTERRUPT)


def read_sessions(path: Path) -> list[Session]:
    """The sessions of a JSON Lines file in EgoProactive's format. Raises InputError, naming the line."""
    sessions = []
    for where, row in _rows(path):
        video, query = row.get("video_path", ""), row.get("query")
        if not isinstance(video, str):
            raise InputError(f"{where}: video_path is {video!r:.60}, expected the name of a video")
        where = f"{where} ({video})"
        sessions.append(
            Session(
                where=where,
                video_path=video,
                task=str(row.get("task", "unknown")),
                query=query if isinstance(query, str) else None,
                intervals=_intervals(where, row.get("video_intervals", [])),
                answers=_answers(where, row.get("answers")),
            )
        )
    return sessions


def read_submission(path: Path, sessions: Sequence[Session]) -> list[tuple[str, ...]]:
    """The predicted answers [S][up to N], one line per session in the sessions' order, as the official scorer pairs
    them. A line without `answers` predicts nothing. Raises InputError where lines are missing or of other videos."""
    rows = _rows(path)
    if len(rows) != len(sessions):
        raise InputError(f"{path}: {len(rows)} lines, expected one for each of the {len(sessions)} sessions, in order")
    for session, (where, row) in zip(sessions, rows, strict=True):
        video = row.get("video_path", session.video_path)
        if _stem(str(video)) != _stem(session.video_path):
            raise InputError(f"{where}: video_path is {video!r}, expected {session.video_path!r} as in {session.where}")
    return [_answers(where, row.get("answers", [])) for where, row in rows]


def write_submission(path: Path, sessions: Sequence[Session], answers: Sequence[Sequence[str]]) -> None:
    """One line per session: {"video_path": ..., "answers": [...]}, renamed into place when complete."""
    rows = [{"video_path": s.video_path, "answers": list(a)} for s, a in zip(sessions, answers, strict=True)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not blank."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path}: {reason}, expected JSON Lines") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number}: {line.strip()!r:.60}, expected a JSON object")
            rows.append((f"{path} line {number}", row))
    return rows


def _answers(where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise InputError(f"{where}: answers is {given!r:.60}, expected a list of {SILENT} and {INTERRUPT}TEXT")
    return tuple(given)


def _intervals(where: str, given: Any) -> tuple[tuple[float, float], ...]:
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        seconds = isinstance(pair, list) and len(pair) == 2 and all(type(t) in (int, float) for t in pair)
        if not (seconds and all(math.isfinite(t) for t in pair) and pair[0] <= pair[1]):
            raise InputError(f"{where}: video_intervals holds {pair!r:.60}, expected [start, end] in seconds")
    return tuple((float(start), float(end)) for start, end in pairs)


def _stem(video_path: str) -> str:
    return PurePosixPath(video_path).stem


# ---- sessions and clips ------------------------------------------------------------------------------


def chunk_frames(session: Session, fps: float) -> Ints:
    """int64 [N, 2]: the frames [ceil(start * fps), ceil(end * fps)) of each chunk, absolute, as its reader has them."""
    return np.ceil(np.array(session.intervals, np.float64).reshape(-1, 2) * fps - FLOOR_TOLERANCE).astype(np.int64)


def match_clips(sessions: Sequence[Session], clips: Sequence[ClipExample]) -> list[ClipExample]:
    """[S] each session's clip: of its video, with a speaking label in every interrupt chunk and in no silent one.

    Of several such clips, the one whose user asks the session's query; then the first of the split. Clips that no
    session asks for are left over. Raises InputError, naming the session, where there is none.
    """
    waiting: dict[str, list[ClipExample]] = {}
    for clip in sorted(clips, key=lambda clip: clip.clip):
        waiting.setdefault(clip.video_uid, []).append(clip)
    found = []
    for session in sessions:
        if len(session.intervals) != len(session.answers):
            numbers = f"{len(session.intervals)} video_intervals, {len(session.answers)} answers"
            raise InputError(f"{session.where}: {numbers}, expected one of each per chunk")
        same = waiting.get(_stem(session.video_path), [])
        fitting = [clip for clip in same if _agrees(session, clip)]
        if not fitting:
            lack = " whose speaking labels are its interrupt chunks" if same else ""
            raise InputError(
                f"{session.where}: the split has no clip of video {_stem(session.video_path)!r}{lack}; "
                f"give the sessions file that the split was made from"
            )
        found.append(next((clip for clip in fitting if _asks(clip, session.query)), fitting[0]))
        same.remove(found[-1])
    return found


def _agrees(session: Session, clip: ClipExample) -> bool:
    speaking = clip.labels[SPEAK] == 1
    own = np.clip(chunk_frames(session, clip.fps) - clip.start_frame, 0, clip.num_frames)
    return all(
        speaking[start:end].any() == is_interrupt(answer)
        for (start, end), answer in zip(own.tolist(), session.answers, strict=True)
        if end > start
    )


def _asks(clip: ClipExample, query: str | None) -> bool:
    return query is not None and any(t.role == "user" and t.text.strip() == query.strip() for t in clip.turns)


def answers_of(session: Session, scored: ScoredClip, threshold: float | None, refractory_s: float) -> list[str]:
    """[up to N] what the model answers at each chunk: `$interrupt$` and the texts it wrote there, or `$silent$`.

    Shorter where the clip ends before the session does. threshold: a logit; a live clip needs none.
    """
    clip, said = scored.clip, scored.said
    at = predicted_frames(scored, "speaking", threshold, refractory_s)
    answers = []
    for start, end in chunk_frames(session, clip.fps).tolist():
        if end > start >= clip.end_frame:
            break
        events = at[(at >= start) & (at < end)].tolist()
        texts = [] if said is None else [(said[frame - clip.start_frame] or "").strip() for frame in events]
        answers.append(INTERRUPT + " ".join(filter(None, texts)) if events else SILENT)
    return answers


# ---- numbers -----------------------------------------------------------------------------------------


def outcomes(reference: Sequence[str], predicted: Sequence[str]) -> Ints:
    """int64 [4]: tp, fp, tn, fn over the chunks that have both."""
    both = zip(reference, predicted, strict=False)
    kinds = [(0 if is_interrupt(p) else 3) if is_interrupt(r) else (1 if is_interrupt(p) else 2) for r, p in both]
    return np.bincount(kinds, minlength=4) if kinds else np.zeros(4, np.int64)


def chunk_rates(counts: Any) -> dict[str, Floats]:
    """Rates from tp, fp, tn, fn, counts [..., 4]: float64 [...] each, 0 where undefined."""
    tp, fp, tn, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    rates: dict[str, Floats] = {}
    for name, hits, alarms, misses in (("interrupt", tp, fp, fn), ("silent", tn, fn, fp)):
        precision, recall = _share(hits, hits + alarms), _share(hits, hits + misses)
        rates[f"{name}_precision"], rates[f"{name}_recall"] = precision, recall
        rates[f"{name}_f1"] = _share(2 * precision * recall, precision + recall)
    macro = (rates["interrupt_f1"] + rates["silent_f1"]) / 2
    return {"macro_f1": macro, "gmean_f1": np.sqrt(rates["interrupt_f1"] * rates["silent_f1"])} | rates


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole != 0)


def report_clips(
    sessions: Sequence[Session], clips: Sequence[ScoredClip], threshold: float | None, refractory_s: float
) -> tuple[dict[str, Any] | None, list[list[str]]]:
    """(the metrics of scored clips, their answers [S]); (None, []) where there is no threshold and no clip is live."""
    scored = {id(one.clip): one for one in clips}
    own = [scored[id(clip)] for clip in match_clips(sessions, [one.clip for one in clips])]
    if threshold is None and any(one.said is None for one in own):
        return None, []
    answers = [answers_of(s, one, threshold, refractory_s) for s, one in zip(sessions, own, strict=True)]
    return report_chunks(sessions, answers, [one.clip.recording_id for one in own]), answers


def report_chunks(
    sessions: Sequence[Session],
    answers: Sequence[Sequence[str]],
    recordings: Sequence[str] | None = None,
    draws: int = 10_000,
) -> dict[str, Any]:
    """The official scorer's results, plain numbers of 4 decimals, with 95% intervals (None: too few recordings).

    answers: [S] as in a submission; recordings: [S] the recording of each, None: its video; draws: of the recordings,
    0: no intervals. `skipped_chunks` are those that only one side has.
    """
    pairs = list(zip((session.answers for session in sessions), answers, strict=True))
    counts = np.array([outcomes(*pair) for pair in pairs], np.int64).reshape(-1, 4)
    of = recordings or [_stem(session.video_path) for session in sessions]
    tasks: dict[str, list[int]] = {}
    for i, session in enumerate(sessions):
        tasks.setdefault(session.task, []).append(i)
    return {
        "overall": _group(counts, of, draws),
        "per_task": {task: _group(counts[own], [of[i] for i in own], draws) for task, own in sorted(tasks.items())},
        "total_sessions": len(sessions),
        "skipped_chunks": sum(abs(len(reference) - len(predicted)) for reference, predicted in pairs),
    }


def _group(counts: Ints, of: Sequence[str], draws: int) -> dict[str, Any]:
    """The metrics of one group of sessions, from its counts [S, 4] and recordings [S]."""
    totals = counts.sum(0)
    rates, names = chunk_rates(totals), sorted(set(of))
    intervals: dict[str, list[float] | None] = dict.fromkeys(rates)
    if len(names) > 1 and draws:
        sums = np.zeros((len(names), 4))
        np.add.at(sums, [names.index(name) for name in of], counts)
        drawn = draw_recordings(len(names), draws) @ sums
        lacking = ((_classes(drawn) == 0) & (_classes(totals) > 0)).any(-1)
        for name, values in chunk_rates(np.concatenate([totals[None], drawn])).items():
            values[1:][lacking] = np.nan
            found = interval_of(values[None], len(names), (0.0, 1.0))
            if found.low is not None and found.high is not None:
                intervals[name] = [round(found.low, DECIMALS), round(found.high, DECIMALS)]
    return {
        **{name: round(float(value), DECIMALS) for name, value in rates.items()},
        **dict(zip(COUNTS, totals.tolist(), strict=True)),
        "support": int(totals.sum()),
        "recordings": len(names),
        "intervals": intervals,
    }


def _classes(counts: Any) -> Any:
    """[..., 2]: how many chunks are interrupts, and silent, by the reference. A draw without a class says nothing."""
    return np.stack([counts[..., 0] + counts[..., 3], counts[..., 1] + counts[..., 2]], axis=-1)
