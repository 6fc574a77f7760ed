"""Make methods ready for use: calibrate those that need it, fit DIP's split where asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.calibration import calibrate
from dipnet.adapt.split import fit_split
from dipnet.methods.base import Method
from dipnet.methods.dip import DIP
from dipnet.models.families import describe

CALIBRATION_TOKENS = 16384
"""How much calibration text is used at most."""


@dataclass(frozen=True)
class Fitter:
    """Makes methods ready for one model: ``fitter(method)`` is the method, fitted.

    ``calibration`` and ``split_text`` are (n,) tokens or None, read in windows of ``window``
    tokens that begin with ``bos`` if given; ``batch_size`` of them are measured at a time. A method
    that needs a calibration text and gets none is an InputError, and so is a method that cannot
    work on the model. DIP-like methods that bring a split of their own keep it.
    """

    model: PreTrainedModel
    window: int
    calibration: Tensor | None = None
    split_text: Tensor | None = None
    batch_size: int = 1
    bos: int | None = None

    def __call__(self, method: Method) -> Method:
        """The method, ready for ``sparsify``."""
        spec = describe(self.model)
        method.check_model(spec)
        if self.split_text is not None and isinstance(method, DIP) and not method.has_own_division:
            method = self._with_split(method, self.split_text)
        if method.needs_calibration and self.calibration is not None:
            method = calibrate(self.model, method, self.calibration, self.window, self.bos)
        method.check(spec)
        return method

    def _with_split(self, method: DIP, text: Tensor) -> DIP:
        fitted, _ = fit_split(
            self.model,
            method,
            text,
            window=self.window,
            bos=self.bos,
            batch_size=self.batch_size,
        )
        return fitted
