"""Models on a GPU, tested on a machine without one: the kernels' meaning in plain torch.

Triton's interpreter would take minutes for a few tokens; tests/kernels runs the kernels there.
"""

import pytest
import torch

from dipnet.kernels import steps
from dipnet.kernels.gpu import choice
from tests.streaming.conftest import one_thread, stores  # noqa: F401


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the references compute, whatever could interpret the kernels."""
    if not torch.cuda.is_available():
        for module in (choice, steps):
            monkeypatch.setattr(module, "why_not", lambda *_: "is not asked for here")
