"""EgoProactive's metrics: in which chunks of a session does the system speak, and in which should it?

A chunk is `$interrupt$TEXT` or `$silent$`; a chunk of a scored clip is an interrupt where a speaking event fires in it,
so runs, scores files and submissions are counted by the same code. The rules are those of the official scorer
(`score_proactive` in starter_kit/run_evaluation.py of `facebook/wearable-ai`): counts pooled over all chunks, 0 where a
ratio is undefined, chunks without a prediction left out and counted. The intervals are ours.

    N chunks of a session    S sessions    R recordings    B draws
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec
import numpy as np

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.labels import FLOOR_TOLERANCE
from pipeline.schema import SPEAKING
from pipeline.storage import write_text
from trainer.evaluation.bootstrap import draw_recordings, interval_of
from trainer.evaluation.event_metrics import predicted_frames
from trainer.evaluation.frame_metrics import ratio
from trainer.evaluation.scores import Floats, Ints, ScoredClip

INTERRUPT, SILENT = "$interrupt$", "$silent$"
COUNTS: Final = ("tp", "fp", "tn", "fn")  # interrupt is the positive class
DECIMALS: Final = 4  # as the official scorer prints


class Session(msgspec.Struct):
    """One line of a sessions file, or of a submission, whose fields may be absent."""

    video_path: str = ""
    task: Any = "unknown"
    video_intervals: tuple[tuple[float, float], ...] = ()  # [N] [start, end) in seconds, ascending
    answers: tuple[str, ...] = ()  # [N]
    where: str = ""  # for messages: file, line, video

    @property
    def video(self) -> str:
        return PurePosixPath(self.video_path).stem


def is_interrupt(answer: str) -> bool:
    """Whether the answer starts with `$interrupt$` after leading white space; anything else is silence."""
    return answer.lstrip().startswith(INTERRUPT)


def read_sessions(path: Path) -> list[Session]:
    """The sessions of a JSON Lines file in EgoProactive's format. Raises InputError, naming the line."""
    sessions = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            try:
                sessions.append(session := msgspec.json.decode(line, type=Session))
            except msgspec.MsgspecError as error:
                form = "expected an object with video_path, video_intervals [[start_s, end_s], ...] and answers [...]"
                raise InputError(f"{path} line {number}: {error}; {form}") from None
            session.where = f"{path} line {number} ({session.video_path})"
    return sessions


def read_submission(path: Path, sessions: Sequence[Session]) -> list[tuple[str, ...]]:
    """The predicted answers [S][up to N], one line per session in the sessions' order, as the official scorer pairs
    them. A line without `answers` predicts nothing. Raises InputError where lines are missing or of other videos."""
    lines = read_sessions(path)
    if len(lines) != len(sessions):
        raise InputError(f"{path}: {len(lines)} lines, expected one for each of the {len(sessions)} sessions, in order")
    for session, line in zip(sessions, lines, strict=True):
        if line.video not in ("", session.video):
            raise InputError(f"{line.where}: expected the video {session.video_path!r} as in {session.where}")
    return [line.answers for line in lines]


def write_submission(path: Path, sessions: Sequence[Session], answers: Sequence[Sequence[str]]) -> None:
    """One line per session: {"video_path": ..., "answers": [...]}, renamed into place when complete."""
    rows = [{"video_path": s.video_path, "answers": list(a)} for s, a in zip(sessions, answers, strict=True)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def chunk_frames(session: Session, fps: float) -> Ints:
    """int64 [N, 2]: the frames [ceil(start * fps), ceil(end * fps)) of each chunk, absolute, as its reader has them."""
    return np.ceil(np.array(session.video_intervals, float).reshape(-1, 2) * fps - FLOOR_TOLERANCE).astype(np.int64)


def match_clips(sessions: Sequence[Session], clips: Sequence[ClipExample]) -> list[ClipExample]:
    """[S] each session's clip: of its video, with a speaking label in every interrupt chunk and in no silent one; of
    several, the first of the split that is left. Raises InputError, naming the session, where there is none."""

    def fits(session: Session, clip: ClipExample) -> bool:
        own = np.clip(chunk_frames(session, clip.fps) - clip.start_frame, 0, clip.num_frames).tolist()
        return len(own) == len(session.answers) and all(
            (clip.labels[SPEAKING, start:end] == 1).any() == is_interrupt(answer)
            for (start, end), answer in zip(own, session.answers, strict=True)
            if end > start
        )

    waiting = sorted(clips, key=lambda clip: clip.clip)
    matched = []
    for session in sessions:
        fitting = [clip for clip in waiting if clip.video_uid == session.video and fits(session, clip)]
        if not fitting:
            problem = f"the split has no clip of video {session.video!r} whose speaking labels are its interrupt chunks"
            raise InputError(f"{session.where}: {problem}; give the sessions file that the split was made from")
        matched.append(fitting[0])
        waiting.remove(fitting[0])
    return matched


def answers_of(session: Session, scored: ScoredClip, threshold: float | None, refractory_s: float) -> list[str]:
    """[up to N] the model's answer at each chunk: `$interrupt$` and the texts it wrote there, or `$silent$`.

    Shorter where the clip ends before the session does. threshold: a logit; a free-running clip needs none.
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


def chunk_rates(counts: Any) -> dict[str, Floats]:
    """Rates from tp, fp, tn, fn, counts [..., 4]: float64 [...] each, 0 where undefined."""
    tp, fp, tn, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    rates: dict[str, Floats] = {}
    for name, hits, alarms, misses in (("interrupt", tp, fp, fn), ("silent", tn, fn, fp)):
        precision, recall = (np.nan_to_num(ratio(hits, hits + errors)) for errors in (alarms, misses))
        f1 = np.nan_to_num(ratio(2 * precision * recall, precision + recall))
        rates |= {f"{name}_precision": precision, f"{name}_recall": recall, f"{name}_f1": f1}
    interrupt, silent = rates["interrupt_f1"], rates["silent_f1"]
    return {"macro_f1": (interrupt + silent) / 2, "gmean_f1": np.sqrt(interrupt * silent)} | rates


def report_clips(
    sessions: Sequence[Session], clips: Sequence[ScoredClip], threshold: float | None, refractory_s: float
) -> tuple[dict[str, Any] | None, list[list[str]]]:
    """(the metrics of scored clips, their answers [S]); (None, []) without a threshold, unless all are free-running."""
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
) -> dict[str, Any]:
    """The official scorer's results, plain numbers of 4 decimals, with 95% intervals (None: too few recordings).

    answers: [S] as in a submission; recordings: [S], None: the videos. `skipped_chunks`: those that one side lacks.
    """
    counts, skipped = np.zeros((len(sessions), 4), np.int64), 0
    for own, session, predicted in zip(counts, sessions, answers, strict=True):
        skipped += abs(len(session.answers) - len(predicted))
        for right, answer in zip(map(is_interrupt, session.answers), map(is_interrupt, predicted), strict=False):
            own[COUNTS.index(("t" if right == answer else "f") + ("p" if answer else "n"))] += 1
    names = np.array(recordings or [session.video for session in sessions], np.str_)
    tasks = np.array([str(session.task) for session in sessions], object)
    return {
        "overall": _report_group(counts, names),
        "per_task": {task: _report_group(counts[tasks == task], names[tasks == task]) for task in sorted({*tasks})},
        "total_sessions": len(sessions),
        "skipped_chunks": skipped,
    }


def _report_group(counts: Ints, recordings: Any) -> dict[str, Any]:
    """The metrics of one group of sessions, from its counts [S, 4] and recordings [S]."""
    totals, (names, place) = counts.sum(0), np.unique(recordings, return_inverse=True)
    rates = chunk_rates(totals)
    intervals: dict[str, Any] = dict.fromkeys(rates)
    if len(names) > 1:
        sums = np.zeros((len(names), 4))
        np.add.at(sums, place, counts)
        drawn = np.concatenate([totals[None], draw_recordings(len(names)) @ sums])
        classes = np.stack([drawn[:, 0] + drawn[:, 3], drawn[:, 1] + drawn[:, 2]], axis=1)  # interrupts, silent chunks
        lacking = ((classes == 0) & (classes[0] > 0)).any(axis=1)  # a draw without a class says nothing
        for name, values in chunk_rates(drawn).items():
            interval = interval_of(np.where(lacking, np.nan, values)[None], len(names), (0.0, 1.0))
            if interval.low is not None and interval.high is not None:
                intervals[name] = [round(interval.low, DECIMALS), round(interval.high, DECIMALS)]
    return {
        **{name: round(float(value), DECIMALS) for name, value in rates.items()},
        **dict(zip(COUNTS, totals.tolist(), strict=True)),
        "support": int(totals.sum()),
        "recordings": len(names),
        "intervals": intervals,
    }
