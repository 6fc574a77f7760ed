"""A small store to read, and to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dipnet.pack.packing import pack
from tests.families import tiny


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny("llama").float().save_pretrained(folder / "model")
    pack(str(folder / "model"), folder / "store")
    pack(str(folder / "model"), folder / "neurons", unit="neuron")
    return folder / "store"


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "store"))


@pytest.fixture
def neurons(packed: Path, tmp_path: Path) -> Path:
    """The same model in records of whole neurons."""
    return Path(shutil.copytree(packed.with_name("neurons"), tmp_path / "neurons"))
