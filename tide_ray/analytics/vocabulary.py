"""The texts of a model's tokens and what kind of token each is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from tide_ray.messages import one_line
from tide_ray.types import SamplingParams, UserError

WHITESPACE, DIGITS, PUNCTUATION, WORD_START, WORD_PIECE, SPECIAL = CLASSES = (
    "whitespace", "digits", "punctuation", "word start", "word piece", "special",
)  # fmt: skip
"""``punctuation``: no letter and no digit, symbols included. ``word start``: letters after a space that belongs to the
token; the first word of a line has none and counts as ``word piece``. ``special``: end of sequence and its like."""
SENTENCEPIECE_SPACE = "\u2581"
REPLACEMENT = "\ufffd"
VOCABULARY_SCHEMA = pa.schema([("token_id", pa.int32()), ("token", pa.string()), ("token_class", pa.string())])


class Vocabulary:
    """A tokenizer's tokens. ``note`` says why there are none.

    Args:
        model: as a job names it; None when the output does not say.
        revision: of a hub model.
    """

    def __init__(self, model: str | None, revision: str | None) -> None:
        self.note: str | None = None
        self.tokenizer: Any = None
        try:
            self.tokenizer = _load(model, revision)
        except (UserError, OSError) as error:
            self.note = f"token texts are NULL: {one_line(error)}"

    def table(self) -> pa.Table:
        """``token_id``, ``token`` (its text) and ``token_class`` of every token; without a tokenizer no rows."""
        if self.tokenizer is None:
            return VOCABULARY_SCHEMA.empty_table()
        ids = list(range(len(self.tokenizer)))
        special = {*self.tokenizer.all_special_ids}
        texts = [self._text(token_id) for token_id in ids]
        classes = [SPECIAL if token_id in special else token_class(texts[token_id]) for token_id in ids]
        return pa.table([ids, texts, classes], schema=VOCABULARY_SCHEMA)

    def pieces(self, token_ids: list[int]) -> list[str]:
        """An answer's text, token by token; "" for special tokens and for those that a later one completes."""
        from tide_ray.engine.detokenizer import Detokenizer

        if self.tokenizer is None:
            return [""] * len(token_ids)
        detokenizer = Detokenizer(self.tokenizer, SamplingParams())
        for token_id in token_ids:
            detokenizer.append(token_id)
        detokenizer.finish()
        starts = [0, *detokenizer.token_ends]
        return [detokenizer.text[start:end] for start, end in zip(starts, detokenizer.token_ends, strict=False)]

    def _text(self, token_id: int) -> str:
        text: str = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        # Decoders in the style of SentencePiece drop the space that a text begins with, which here is the token's own.
        dropped = piece is not None and piece.startswith(SENTENCEPIECE_SPACE) and not text.startswith(" ")
        return f" {text}" if dropped else text


def token_class(text: str) -> str:
    """One of ``CLASSES`` but ``special``."""
    bare = text.strip()
    if not bare:
        return WHITESPACE
    if bare.isdigit():
        return DIGITS
    if REPLACEMENT not in bare and not any(map(str.isalnum, bare)):
        return PUNCTUATION
    return WORD_START if text[0].isspace() else WORD_PIECE


def _load(model: str | None, revision: str | None) -> Any:
    if model is None:
        raise UserError("the output does not name its model")
    from tide_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model, revision=revision)
    if tokenizer is None:
        raise UserError(f"model: {model!r} comes without a tokenizer")
    return tokenizer
