"""Errors that a user can mend. `cli` turns them into one line on stderr and an exit status."""

from __future__ import annotations


class InputError(ValueError):
    """The input, or the folder, cannot be used (exit status 1). The message: where, found, expected, next."""


class NotFiniteError(InputError):
    """A loss, a gradient or a score is NaN or infinite. Raised on every rank at once."""


class UsageError(ValueError):
    """The command was asked for something that makes no sense (exit status 2)."""
