"""What every test relies on: no network, one seed, and CUDA tests only where there is CUDA."""

import os

import hypothesis
import pytest
import torch

# How long an example takes says nothing of the code: machines are shared.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Processes that test side by side share the processors.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which is later
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when our Triton kernels are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
