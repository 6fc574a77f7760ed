"""Stores of tiny models, packed once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dipnet.pack.packing import pack
from dipnet.store.geometry import Unit, Weights
from tests.families import tiny
from tests.matrix import one_thread  # noqa: F401

Stores = Callable[..., Path]


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """(family, kind of weights, block, unit) -> the folder of its store; leave it as it is."""

    @cache
    def checkpoint(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny(family).float().save_pretrained(folder)
        return folder

    @cache
    def store(family: str, weights: Weights, block: int = 1, unit: Unit = "column") -> Path:
        folder = tmp_path_factory.mktemp("stores") / "store"
        pack(str(checkpoint(family)), folder, weights, block, unit=unit)
        return folder

    return store
