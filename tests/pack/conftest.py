"""Checkpoints to pack, and a second reading of what a store says about its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a family's tiny model; options go to ``save_pretrained``."""

    def save(family: str, **options: object) -> Path:
        folder = tmp_path / family
        tiny(family).float().save_pretrained(folder, **options)
        return folder

    return save
