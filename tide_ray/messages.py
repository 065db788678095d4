"""What went wrong, in one line."""

from __future__ import annotations


def one_line(what: object, limit: int | None = None) -> str:
    """The text of an error (its class where it has none), or of anything else, without line ends.

    Cut after ``limit`` characters.
    """
    text = " ".join(str(what).split())
    return (type(what).__name__ if not text and isinstance(what, BaseException) else text)[:limit]


def named(error: BaseException, limit: int = 300) -> str:
    """The error's class and its text, cut after ``limit`` characters: for libraries whose texts alone say little."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= limit else f"{text[:limit]}..."
    return f"{type(error).__name__}: {shown}" if text else type(error).__name__
