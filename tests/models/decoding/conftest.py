"""The kernels' room on a machine without a GPU: their meaning in plain torch, or interpreted."""

import pytest
import torch

from dipnet.models import backends


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend "gpu" is not refused for want of a GPU; without one its reference computes."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(backends, "why_not_tensors", lambda *_: None)
