"""A predictor's scores by the kernels: `dipnet.methods.predictors`, without copies in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.kernels import gpu
from dipnet.methods.dejavu import KIND_OF, DejaVu
from dipnet.units import Site


class PredictedScores:
    """One site's scores, from the weights as they were given: in bfloat16 half as much is read."""

    def __init__(self, method: DejaVu, site: Site, device: torch.device) -> None:
        fitted = method.fitted
        assert fitted is not None, "check() comes first"
        predictor = fitted.layers[KIND_OF[site.name]][site.layer]
        self.activation = fitted.activation
        self.inner, self.outer = (
            (weight.to(device).contiguous(), bias.to(device))
            for weight, bias in ((predictor.w1, predictor.b1), (predictor.w2, predictor.b2))
        )
        self.rows = [
            torch.arange(len(weight), dtype=torch.int32, device=device)
            for weight, _ in (self.inner, self.outer)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, width) residual stream -> (rows, units) float32."""
        (first, bias), rows = self.inner, self.rows[0]
        x = gpu.rows_product(
            x, rows, first, bias=bias, activation=self.activation, dtype=torch.float32
        )
        (second, bias), rows = self.outer, self.rows[1]
        return gpu.rows_product(x, rows, second, bias=bias)
