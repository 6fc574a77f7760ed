"""Where the GPU kernels are tested: on a GPU, else in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from dipnet.kernels.gpu import choice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = choice.why_not(torch.empty(0, device=DEVICE))

launch = choice.launch

needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=f"backend 'gpu' {WHY_NOT}")
