"""Where a pretrained model's files come from: a folder, a run, or the hub; without a network, the hub's cache."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError


def model_folder(name: str) -> str:
    """Where a model's files are: a run's are in its `last`."""
    last = Path(name) / "last"
    return str(last) if last.is_dir() else name


@contextlib.contextmanager
def loading(name: str | Path, kind: str) -> Iterator[dict[str, Any]]:
    """Options of from_pretrained: only the hub's cache where the hub can't be reached (left to itself the library
    retries for minutes). Whatever is raised, by a damaged file among others, becomes an InputError."""
    options = {} if Path(name).exists() or _hub_answers() else {"local_files_only": True}
    try:
        yield options
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = "offline: the hub does not answer, and its cache has no such model" if options else reason
        raise InputError(f"{name}: no {kind} could be loaded ({reason}); give a folder, or tiny") from None


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub answers within 8 seconds; asked once per process. (A look-up of its name may hang for longer.)"""
    from huggingface_hub import constants, get_session

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of whatever library: there is no network, or HF_HUB_OFFLINE is set
            answers.append(get_session().head(constants.ENDPOINT, timeout=5).status_code < 400)  # else a proxy's

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(8)
    return answers == [True]
