"""Text of one sequence as its tokens arrive, cut at stop strings wherever the token borders are.

Needed only for stop strings and streaming; otherwise decoding once at the end is cheaper. Special tokens are skipped.
After ``finish`` the text is ``tokenizer.decode(ids, skip_special_tokens=True)``, cut at the stop string if one came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tide_ray.types import SamplingParams

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""


def find_stop(text: str, stop_strings: Sequence[str], search_from: int = 0) -> tuple[str, int] | None:
    """The stop string that starts earliest among those that end after ``search_from``, and where it starts.

    Of two that start together the one listed first wins. ``search_from`` is the length of the text already searched.
    """
    found: tuple[str, int] | None = None
    for stop in stop_strings:
        index = text.find(stop, max(0, search_from - len(stop) + 1))
        if index >= 0 and (found is None or index < found[1]):
            found = stop, index
    return found


def num_held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may become a stop string, and so must not be streamed yet."""
    longest = min(len(text), max(map(len, stop_strings), default=0) - 1)
    for length in range(longest, 0, -1):
        if any(len(stop) > length and text.endswith(stop[:length]) for stop in stop_strings):
            return length
    return 0


class Detokenizer:
    """Incremental text of one sequence.

    Args:
        tokenizer: a transformers tokenizer.
        params: ``stop`` and ``min_tokens`` are read; a stop string that ends within the first ``min_tokens`` tokens is
            text like any other.

    Attributes:
        stop_string: the stop string that ended the text, None so far.
        token_ends: for every token, the length of the text once it was appended; ``text`` may be cut shorter later.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self.stop_string: str | None = None
        self.token_ends: list[int] = []
        self._tokenizer = tokenizer
        self._params = params
        self._token_ids: list[int] = []
        self._text = ""
        self._is_finished = False
        # The last tokens whose text was taken, and those after them. The text of a token may depend on the one before
        # it (a leading space, say). The DecodeStream of the tokenizers library would save a few microseconds, but it
        # raises on invalid UTF-8 from a byte-fallback vocabulary.
        self._window: list[int] = []
        self._num_taken = 0

    @property
    def text(self) -> str:
        """The text so far, without a character whose bytes are not all there yet, cut at the stop string."""
        return self._text

    @property
    def stable_text(self) -> str:
        """The start of ``text`` that may be streamed, as no stop string can cut it any more; it ends as ``text``.

        It only grows, unless a byte-fallback vocabulary wrote invalid UTF-8: its decoder then replaces whole runs.
        """
        if self._is_finished or self.stop_string is not None or not self._params.stop:
            return self._text
        return self._text[: len(self._text) - num_held_back(self._text, self._params.stop)]

    def append(self, token_id: int) -> None:
        """Add the next token; ignored once a stop string was found. Costs O(new text + longest stop string)."""
        assert not self._is_finished, "append after finish"
        if self.stop_string is not None:
            return
        self._token_ids.append(token_id)
        num_searched = len(self._text)
        self._text += self._new_text(token_id)
        self.token_ends.append(len(self._text))
        if len(self._token_ids) > self._params.min_tokens:
            self._cut(num_searched)

    def finish(self) -> None:
        """No more tokens: incomplete UTF-8 at the end becomes U+FFFD, and what was held back becomes text."""
        self._is_finished = True
        if self.stop_string is not None:
            return
        num_searched = len(self._text)
        self._text = self._decode(self._token_ids)
        if self.token_ends:
            self.token_ends[-1] = len(self._text)
        if len(self._token_ids) > self._params.min_tokens:
            self._cut(num_searched)

    def _cut(self, num_searched: int) -> None:
        found = find_stop(self._text, self._params.stop, num_searched)
        if found is not None:
            self.stop_string, index = found
            self._text = self._text[:index]

    def _new_text(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._decode(self._window[: self._num_taken])
        text = self._decode(self._window)
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        del self._window[: self._num_taken]
        self._num_taken = len(self._window)
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
