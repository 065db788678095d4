"""Changes to a model's files, and what ``load`` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tide_ray.models.loading import load
from tide_ray.types import UserError


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def error_of(model: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
