"""Where the GPU kernels are tested: on a GPU, else in Triton's interpreter (tests/conftest.py), and
those in CUDA C++ on any machine (on_cpu).

NVIDIA's tools look for bad accesses and races while the same tests run; PyTorch's allocator has to
be off, or it hides what lies behind a tensor:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \\
        python -m pytest tests/kernels -k "9-40 or 1025 or 33-dtype0 or 20000-dtype0 or list_heads"

and the same with --tool racecheck.

Without that option memcheck also lists calls of the driver that PyTorch tries and does not need.
"""

import pytest
import torch

from dipnet.kernels.gpu import choice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = choice.why_not(torch.empty(0, device=DEVICE))

launch = choice.launch

needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=f"backend 'gpu' {WHY_NOT}")
