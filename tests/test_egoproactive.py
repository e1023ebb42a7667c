"""docs/egoproactive.md, run as it stands on made-up sessions and videos: from the published file to the numbers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest

from trainer.cli import main
from trainer.evaluation.metrics import evaluate_submission

DOC = (Path(__file__).parents[1] / "docs/egoproactive.md").read_text(encoding="utf-8")
SESSIONS = Path("wearable-ai/egoproactive/sessions_test.jsonl")
FPS = 15


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def write_video(path: Path, speaking: list[bool]) -> None:
    """One second a chunk: white where the assistant speaks."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for speaks in speaking:
            for _ in range(FPS):
                picture = np.full((64, 64, 3), 255 * speaks, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))


def write_dataset(folder: Path, sessions: int = 10, chunks: int = 6) -> None:
    """The published layout: chunks of 1 s, the third one annotated by nobody."""
    (folder / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(sessions):
        speaking = [True, *(rng.random(chunks - 1) < 0.4).tolist()]
        write_video(folder / "val" / f"ego{i}.mp4", speaking)
        kept = [k for k in range(chunks) if k != 2]
        lines.append(
            {
                "video_path": f"ego{i}.mp4",
                "duration_in_sec": float(chunks),
                "video_intervals": [[float(k), k + 1.0] for k in kept],
                "query": "How do I pot a cactus?",
                "domain": "Gardening",
                "task": f"Potting {i % 2}",
                "answers": ["$interrupt$Gravel first." if speaking[k] else "$silent$" for k in kept],
                "dialog": [[{"role": "user", "text": "How do I pot a cactus?"}] for _ in kept],
            }
        )
    path = folder / "wearable_ai_2026_egoproactive_val_700.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def commands():
    """Every documented command of ours, as arguments; globs and $EGO filled in as a shell does."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("prospect-dst ")]
    assert [line.split()[1] for line in lines] == ["preprocess", "train", *["evaluate"] * 4]
    for line in lines:
        words = shlex.split(line.replace("$EGO", str(SESSIONS.parent)), comments=True)[1:]
        yield [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


@pytest.mark.slow
def test_the_documented_commands_lead_from_the_published_files_to_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(SESSIONS.parent)
    (source,) = blocks("python")  # the split of the sessions
    exec(source, {})
    parts = [path.read_text().splitlines() for path in SESSIONS.parent.glob("sessions_*.jsonl")]
    whole = (SESSIONS.parent / "wearable_ai_2026_egoproactive_val_700.jsonl").read_text().splitlines()
    assert sorted(line for part in parts for line in part) == sorted(whole)  # every session once
    small = {"HuggingFaceTB/SmolVLM2-256M-Video-Instruct": "tiny", "300": "2"}
    for line in commands():
        if "anybody.parquet" in line:  # perfect: nothing is known of the second between chunks
            frames = pl.read_parquet("ego/frames").with_columns(speaking_logit=pl.col("speaking_label").cast(float))
            frames.select("split", "clip_id", "frame", "speaking_logit").write_parquet("anybody.parquet")
        capsys.readouterr()
        more = ["--workers", "1"] if line[0] == "preprocess" else []
        assert main([*(small.get(word, word) for word in line), *more]) == 0
        printed = capsys.readouterr().out
        assert ("macro F1" in printed) == (line[0] == "evaluate")
        if "anybody.parquet" in line:
            assert re.search(r"macro F1 +1\.0000 \[1\.0000, 1\.0000\]", printed)
    metrics = json.loads(Path("run/evaluation-test/metrics.json").read_text())
    sessions = [json.loads(line) for line in SESSIONS.open()]
    for mode in ("teacher-forced", "free-running"):
        assert metrics[mode]["chunks"]["overall"]["support"] == sum(len(session["answers"]) for session in sessions)
    free = metrics["free-running"]["chunks"]
    assert evaluate_submission(Path("submission.jsonl"), SESSIONS).metrics["submission"]["chunks"] == free
