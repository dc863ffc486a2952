"""Errors that a user reads: one line saying what was given, what is needed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PalimpsestError(Exception):
    """A failure that is not the user's mistake. The command line exits with 1."""

    exit_code = 1


class UserError(PalimpsestError):
    """The user's mistake, told in one line. The command line exits with 2."""

    exit_code = 2


def unknown(what: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist: names the near ones, or all when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return UserError(f"unknown {what} {given!r}; {hint}")
