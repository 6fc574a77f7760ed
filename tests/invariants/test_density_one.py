"""Density 1 is the dense model, to the bit."""

import pytest
import torch

import dipnet
from tests.families import FAMILIES, random_tokens, shared
from tests.matrix import (
    CALIBRATION,
    METHODS,
    PAIRS,
    WINDOW,
    at_density_one,
    logits,
    of_family,
    sparse,
)

TOKENS = random_tokens(2, 9)
# 2:4 fixes its density.
OPEN_PAIRS = [pair for pair in PAIRS if pair.values[1] != "wanda-2:4"]


@pytest.mark.parametrize(("family", "method"), OPEN_PAIRS)
def test_logits_are_the_dense_models(family: str, method: str) -> None:
    model = shared(family)
    dense = logits(model, TOKENS)
    whole = at_density_one(of_family(family, method))
    fitted = dipnet.calibrate(model, whole, CALIBRATION, window=WINDOW)
    with dipnet.sparsify(model, fitted):
        assert torch.equal(logits(model, TOKENS), dense)
        assert dipnet.usage(model).density().mlp == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_other_dtypes(family: str, dtype: torch.dtype) -> None:
    model = shared(family, dtype)
    dense = logits(model, TOKENS)
    with dipnet.sparsify(model, dipnet.DIP(1.0, attention_density=1.0)):
        assert torch.equal(logits(model, TOKENS), dense)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_a_lower_density_changes_the_logits(method: str) -> None:
    """Else the tests above would pass with masks that are never applied."""
    dense = logits(shared("llama"), TOKENS)
    with sparse("llama", method) as model:
        assert (logits(model, TOKENS) - dense).abs().mean() > 0.01
