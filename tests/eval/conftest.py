"""A tiny model on disk and in memory, for the tests of this folder."""

from pathlib import Path

import pytest

from dipnet.models.load import LoadedModel, load_model
from tests.checkpoints import save_llama


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("llama")
    return load_model(str(save_llama(folder)))
