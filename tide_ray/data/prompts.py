"""What a prompt row is: from a source's columns to prompt, sampling parameters and a stable row id.

A row that cannot be used keeps its place: it has ``error`` set and goes to the job's ``errors/``. Row ids come from the
row's own content and its ordinal among equal rows, never from file names, so that they survive moved and split files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from tide_ray.data.sources import TEXT_COLUMN, Source, SourceRow
from tide_ray.types import SamplingParams, UserError, is_integer

PARAMS_COLUMN = "sampling_params"
PROMPT_COLUMNS = ("prompt", "messages", "prompt_token_ids")
ROW_ID_LENGTH = 32


@dataclass(slots=True)
class PromptRow:
    """One row of the job: exactly one of the three prompts unless ``error`` is set; JSON for nested values.

    ``content_hash`` is of the prompt and the row's own parameters, whatever its id. ``expected_tokens``: how many the
    answer may take, None if nothing is known.
    """

    row_id: str = ""
    content_hash: str = ""
    prompt: str | None = None
    messages: str | None = None
    prompt_token_ids: list[int] | None = None
    sampling_params: str = "{}"
    expected_tokens: int | None = None
    error: str = ""


def prompt_columns(source: Source, chosen: str | None) -> tuple[str, ...]:
    """The columns to look for a prompt in, in order: the chosen one, or every known one that the source has.

    Raises:
        UserError: the source has none of them.
    """
    columns = source.columns
    listing = ", ".join(columns) or "none"
    if chosen is not None:
        if chosen not in columns:
            raise UserError(f"prompt_column: {source.name!r} has no column {chosen!r}; columns: {listing}")
        return (chosen,)
    known = (*PROMPT_COLUMNS, TEXT_COLUMN) if source.is_text else PROMPT_COLUMNS
    found = tuple(name for name in known if name in columns)
    # A file without one readable row has no columns at all; its rows then say what is wrong with them.
    if columns and not found:
        raise UserError(
            f"prompt_column: {source.name!r} has no column {' or '.join(map(repr, PROMPT_COLUMNS))}; columns: {listing}"
        )
    return found


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Chat messages from a list of mappings or its JSON text. Raises UserError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"messages: not JSON: {error}") from None
    if not isinstance(value, Sequence) or not value:
        raise UserError("messages must be a non-empty list of {role, content}")
    messages = []
    for message in value:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or message.get("content") is None
        ):
            raise UserError("messages must be a non-empty list of {role, content}")
        # Arrow gives every message the keys of all messages; the absent ones are null.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def parse_token_ids(value: Any) -> list[int]:
    """Token ids from a list of integers or its JSON text. Raises UserError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"prompt_token_ids: not JSON: {error}") from None
    is_ids = isinstance(value, list) and all(map(is_integer, value))
    if not value or not is_ids or not all(0 <= item < 2**31 for item in value):
        raise UserError("prompt_token_ids must be a non-empty list of token ids")
    return value


def parse_sampling_params(value: Any) -> dict[str, Any]:
    """A row's own sampling parameters from a mapping or its JSON text, nulls dropped."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"sampling_params: not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise UserError(f"sampling_params must be a mapping, got {value!r}")
    return {name: item for name, item in value.items() if item is not None}


class RowMaker:
    """Turns source rows into prompt rows; holds what makes ids unique across a whole input, and their joint hash.

    The hash covers ids and contents in order but not the defaults, so that a changed default reads as just that.
    """

    def __init__(
        self, defaults: SamplingParams, id_column: str | None = None, length_column: str | None = None
    ) -> None:
        self._defaults = non_default_params(defaults)
        self._base_seed = defaults.seed or 0
        self._id_column = id_column
        self._length_column = length_column
        self.digest = sha256()
        self._seen_ids: set[bytes] = set()
        self._ordinals: dict[int, int] = {}

    def make(self, row: SourceRow, columns: Sequence[str]) -> PromptRow:
        """The prompt row.

        Raises:
            UserError: only for what concerns the whole input: an id that is null or used twice, a length that is none.
        """
        made = PromptRow(error=row.problem, prompt=row.raw)
        own_params: dict[str, Any] = {}
        if not row.problem:
            try:
                _set_prompt(made, row, columns)
                own_params = parse_sampling_params(row.values.get(PARAMS_COLUMN))
            except UserError as error:
                made.error = str(error)
        content = _canonical([made.prompt, made.messages, made.prompt_token_ids, own_params, made.error])
        made.row_id = self._given_id(row) if self._id_column and not row.problem else self._content_id(content)
        content_digest = sha256(content)
        made.content_hash = content_digest.hexdigest()[:ROW_ID_LENGTH]
        self.digest.update(made.row_id.encode() + content_digest.digest())
        if not made.error:
            try:
                made.sampling_params = json.dumps(self._merge(made.row_id, own_params))
            except UserError as error:
                made.error = str(error)
            made.expected_tokens = self._given_length(row)
        return made

    def _merge(self, row_id: str, own: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._defaults, **own}
        params = SamplingParams.from_mapping(merged)
        if params.n != 1:
            raise UserError(f"n must be 1 in a job, got {params.n}")
        if params.logprobs is not None:
            raise UserError(f"logprobs are not available in a job, got {params.logprobs}")
        values = non_default_params(params)
        if not params.is_greedy and "seed" not in own:
            # A row that is generated again after a failure must come out the same.
            values["seed"] = int.from_bytes(sha256(f"{self._base_seed}:{row_id}".encode()).digest()[:7], "big")
        return values

    def _content_id(self, content: bytes) -> str:
        # 64 bits are enough to count equal rows: two rows that share them merely get different ordinals.
        key = int.from_bytes(sha256(content).digest()[:8], "big")
        ordinal = self._ordinals.get(key, 0)
        self._ordinals[key] = ordinal + 1
        return sha256(content + f"#{ordinal}".encode()).hexdigest()[:ROW_ID_LENGTH]

    def _given_id(self, row: SourceRow) -> str:
        value = row.values.get(self._id_column or "")
        if value is None or value == "" or isinstance(value, (bool, float, list, dict)):
            raise UserError(f"id_column: {row.place} has {self._id_column!r} = {value!r}; ids are strings or integers")
        row_id = str(value)
        digest = sha256(row_id.encode()).digest()[:16]
        if digest in self._seen_ids:
            raise UserError(f"id_column: id {row_id!r} is used twice, again in {row.place}")
        self._seen_ids.add(digest)
        return row_id

    def _given_length(self, row: SourceRow) -> int | None:
        value = None if self._length_column is None else row.values.get(self._length_column)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**31:
            raise UserError(
                f"length_column: {row.place} has {self._length_column!r} = {value!r}; lengths are numbers of tokens"
            )
        return math.ceil(value)


def _set_prompt(made: PromptRow, row: SourceRow, columns: Sequence[str]) -> None:
    name = next((name for name in columns if row.values.get(name) is not None), None)
    if name is None:
        raise UserError(f"no prompt: {' and '.join(columns)} {'is' if len(columns) == 1 else 'are'} missing or null")
    value = row.values[name]
    if name == "messages" or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        made.messages = _encodable(name, json.dumps(parse_messages(value), ensure_ascii=False, default=str))
    elif name == "prompt_token_ids" or isinstance(value, list):
        made.prompt_token_ids = parse_token_ids(value)
    elif isinstance(value, str):
        if not value:
            raise UserError(f"{name} is empty")
        made.prompt = _encodable(name, value)
    else:
        raise UserError(f"{name} must be a string, messages or token ids, got {type(value).__name__}")


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode at character {error.start}") from None
    return text


def non_default_params(params: SamplingParams) -> dict[str, Any]:
    """The values of ``params`` that differ from SamplingParams' own defaults, as JSON can hold them."""
    values = {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")
