"""Incremental text equals decoding at once, and stop strings are cut wherever the token borders are."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tide_ray.engine.detokenizer import REPLACEMENT, Detokenizer, find_stop, num_held_back
from tide_ray.types import SamplingParams

SPECIAL = "<end>"
TEXTS = [
    "plain words, and more of them.",
    "naïve café: 10 € for ½ a crêpe",
    "日本語のテキスト and العربية and हिन्दी",
    "👩‍👩‍👧 family 🏳️‍🌈 flag 😀😀",
    "  leading and trailing spaces  \n\n\ttabs\n",
    "line one\r\nline two\u2028line three",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: one token per byte, so that every non-ASCII character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: leading spaces belong to tokens, the first one is stripped, unknown characters become bytes."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz,."
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {letter: 257 + i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    replace = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL)


TOKENIZERS = [byte_level_tokenizer(), byte_fallback_tokenizer()]
BYTE_LEVEL = TOKENIZERS[0]


def ids_of(text: str, tokenizer: Any = BYTE_LEVEL) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def params(*stop: str, min_tokens: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=100_000, min_tokens=min_tokens, stop=stop)


def run(text: str, *stop: str, min_tokens: int = 0) -> Detokenizer:
    detokenizer = Detokenizer(BYTE_LEVEL, params(*stop, min_tokens=min_tokens))
    for token_id in ids_of(text):
        detokenizer.append(token_id)
    detokenizer.finish()
    return detokenizer


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_incremental_text_equals_decoding_at_once(tokenizer: Any, text: str) -> None:
    ids = ids_of(text, tokenizer)
    detokenizer = Detokenizer(tokenizer, params())
    seen = ""
    for token_id in ids:
        detokenizer.append(token_id)
        assert detokenizer.text.startswith(seen)
        assert REPLACEMENT not in detokenizer.text
        seen = detokenizer.text
    assert seen == tokenizer.decode(ids)
    detokenizer.finish()
    assert detokenizer.text == seen


def test_the_demo_models_tokenizer_decodes_incrementally_to_the_same_text(demo_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    for text in TEXTS:
        ids = [*ids_of(text, tokenizer), tokenizer.eos_token_id]
        detokenizer = Detokenizer(tokenizer, params())
        for token_id in ids:
            detokenizer.append(token_id)
        assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=True) == text
        detokenizer.finish()
        assert detokenizer.text == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "byte-fallback"])
def test_any_sequence_of_ids_ends_as_decoding_at_once(tokenizer: Any) -> None:
    """Byte-fallback vocabularies rewrite text already shown when bytes turn out invalid; DecodeStream raised there."""
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(30)]
        detokenizer = Detokenizer(tokenizer, params())
        for token_id in ids:
            detokenizer.append(token_id)
        detokenizer.finish()
        assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_split_character_is_shown_only_when_it_is_whole() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, params())
    shown = []
    for token_id in ids_of("a😀b"):
        detokenizer.append(token_id)
        shown.append(detokenizer.text)
    assert shown == ["a", "a", "a", "a", "a😀", "a😀b"]


def test_incomplete_utf8_at_the_end_is_resolved_on_finish() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, params())
    for token_id in ids_of("ok 😀")[:-1]:
        detokenizer.append(token_id)
    assert detokenizer.text == "ok "
    detokenizer.finish()
    assert detokenizer.text == "ok " + REPLACEMENT


def test_special_tokens_are_skipped() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, params())
    for token_id in (*ids_of("a"), BYTE_LEVEL.eos_token_id, *ids_of(" b"), BYTE_LEVEL.eos_token_id):
        detokenizer.append(token_id)
    assert detokenizer.text == "a b"


def test_stop_string_across_tokens_is_cut_cleanly() -> None:
    detokenizer = run("one two\n\nQuestion: three", "\nQuestion:")
    assert detokenizer.text == "one two\n"
    assert detokenizer.stop_string == "\nQuestion:"


def test_stop_string_of_multibyte_characters_is_found() -> None:
    detokenizer = run("sum: 12 €😀 and more", "€😀")
    assert detokenizer.text == "sum: 12 "


def test_stop_string_inside_one_token_is_cut(demo_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    detokenizer = Detokenizer(tokenizer, params("erna"))
    for token_id in ids_of("an international flight", tokenizer):
        detokenizer.append(token_id)
    assert detokenizer.text == "an int"
    assert detokenizer.stop_string == "erna"


def test_tokens_after_the_stop_string_change_nothing() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, params("STOP"))
    for token_id in ids_of("abcSTOP then STOP again"):
        detokenizer.append(token_id)
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stop_string) == ("abc", "STOP")


def test_stop_string_within_min_tokens_is_text() -> None:
    assert run("xSTOPySTOPz", "STOP").text == "x"
    assert run("xSTOPySTOPz", "STOP", min_tokens=4).text == "x"
    assert run("xSTOPySTOPz", "STOP", min_tokens=5).text == "xSTOPy"
    assert run("xSTOPySTOPz", "STOP", min_tokens=11).text == "xSTOPySTOPz"


def test_stop_string_hidden_by_incomplete_utf8_is_found_on_finish() -> None:
    merged = "\n\u00f0"  # two bytes in one token: a newline and the first byte of an emoji
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["\u010a\u00f0", *alphabet])}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([0]) == merged[0] + REPLACEMENT
    detokenizer = Detokenizer(tokenizer, params("\n"))
    detokenizer.append(0)
    assert detokenizer.stop_string is None
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stop_string) == ("", "\n")


def test_the_earliest_stop_string_wins_and_then_the_first_listed() -> None:
    assert find_stop("a bb ccc", ["ccc", "bb"]) == ("bb", 2)
    assert find_stop("abcd", ["abc", "ab"]) == ("abc", 0)
    assert find_stop("abcd", ["ab", "abc"]) == ("ab", 0)
    assert find_stop("abcd", ["x"]) is None
    assert find_stop("abcd", []) is None


def test_find_stop_sees_matches_that_end_in_the_new_text_only() -> None:
    assert find_stop("xxENDyyEND", ["END"], 5) == ("END", 7)
    assert find_stop("xxEND", ["END"], 4) == ("END", 2)
    assert find_stop("xxEND", ["END"], 5) is None


def test_stable_text_holds_back_what_may_become_a_stop_string() -> None:
    assert num_held_back("hello\n", ["\n\nQ"]) == 1
    assert num_held_back("hello\n\n", ["\n\nQ"]) == 2
    assert num_held_back("hello", ["\n\nQ", "low"]) == 2
    assert num_held_back("hello", ["x", "y"]) == 0
    assert num_held_back("hello", []) == 0


def test_streamed_text_is_never_taken_back() -> None:
    alphabet, rng = "ab", random.Random(1)
    stops = ["".join(letters) for n in (2, 3) for letters in product(alphabet, repeat=n)]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(12))
        detokenizer = Detokenizer(BYTE_LEVEL, params(*rng.sample(stops, 2), min_tokens=rng.randrange(4)))
        streamed = ""
        for token_id in ids_of(text):
            detokenizer.append(token_id)
            assert detokenizer.stable_text.startswith(streamed)
            streamed = detokenizer.stable_text
        detokenizer.finish()
        assert detokenizer.stable_text == detokenizer.text
        assert detokenizer.text.startswith(streamed)
