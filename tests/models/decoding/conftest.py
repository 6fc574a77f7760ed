"""The kernels' room on a machine without a GPU: their meaning in plain torch.

Triton's interpreter would take minutes for a few tokens; tests/kernels runs the kernels there.
"""

import pytest
import torch

from dipnet.kernels import steps
from dipnet.kernels.gpu import choice
from dipnet.models import backends


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend "gpu" is not refused for want of a GPU; without one its reference computes."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(backends, "why_not_tensors", lambda *_: None)
        for module in (choice, steps):
            monkeypatch.setattr(module, "why_not", lambda *_: "is not asked for here")
