"""API keys at rest and in use."""

from __future__ import annotations

import hmac
import stat
from pathlib import Path

import pytest

from tide_ray.serve import keys
from tide_ray.serve.keys import ENVIRONMENT_VARIABLE, KeyRing, append_to_file, new_key, read_keys, stored
from tide_ray.serve.limits import RateLimit
from tide_ray.types import UserError


def test_a_key_opens_and_is_not_kept(tmp_path: Path) -> None:
    alice, bob = new_key(), new_key()
    path = tmp_path / "keys"
    for name, key in (("alice", alice), ("bob", bob)):
        append_to_file(str(path), stored(name, key))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert alice not in path.read_text()
    ring = read_keys(path=str(path))
    assert (ring.owner(alice), ring.owner(bob)) == ("alice", "bob")
    assert ring.owner(alice[:-1]) is ring.owner("") is ring.owner(alice.upper()) is None
    assert alice not in repr(vars(ring))
    assert KeyRing(ring.entries).owner(bob) == "bob"


def test_every_key_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key() for _ in range(4)]
    ring = KeyRing(stored(f"k{i}", key) for i, key in enumerate(made))
    calls = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: (calls.append(1), hmac_digest(a, b))[1])
    assert ring.owner(made[0]) == "k0"
    assert len(calls) == 4


hmac_digest = hmac.compare_digest


def test_keys_from_the_environment_may_be_plain_or_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, hashed = new_key(), new_key()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"{plain}, {stored('carol', hashed)}")
    ring = read_keys()
    assert (ring.owner(plain), ring.owner(hashed)) == ("env-1", "carol")


@pytest.mark.parametrize("content", ["tide-secret-key-in-the-clear\n", "alice:sha256:00\n", "# nothing\n", ""])
def test_a_file_that_is_no_key_file_is_refused_without_repeating_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UserError, match="api_keys_file") as caught:
        read_keys(path=str(path))
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        read_keys(path=str(tmp_path / "none"))


def test_a_short_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "hunter2")
    with pytest.raises(UserError, match="fewer than 16") as caught:
        read_keys()
    assert "hunter2" not in str(caught.value)


def test_a_rate_refills_with_time_and_is_each_keys_own() -> None:
    now = 0.0
    rate = RateLimit(6, clock=lambda: now)
    assert [rate.take("a") for _ in range(6)] == [0.0] * 6
    assert rate.take("a") == pytest.approx(10)
    assert rate.take("b") == 0
    now = 5.0
    assert rate.take("a") == pytest.approx(5)
    now = 10.1
    assert rate.take("a") == 0
    assert rate.take("a") > 9
    assert RateLimit(None).take("a") == 0
