"""Bad input to the library: every error is one line that names the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

import dipnet
from dipnet.errors import DipnetError, InputError
from dipnet.models.families import FAMILIES, describe
from tests.families import CONTEXT, gated_family, shared
from tests.matrix import CALIBRATION, WINDOW

WITH_DENSITY: list[Callable[[Any], Any]] = [
    dipnet.DIP,
    dipnet.WINA,
    dipnet.GLUPruning,
    dipnet.GatePruning,
    dipnet.UpPruning,
    dipnet.GLUOracle,
    dipnet.CATS,
    dipnet.TEAL,
    dipnet.Wanda,
    dipnet.CETT,
]


@contextmanager
def complains(*parts: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert isinstance(caught.value, DipnetError)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("density", [0, 0.0, 1.5, -1, float("nan"), float("inf"), True, "x"])
@pytest.mark.parametrize("method", WITH_DENSITY)
def test_density(method: Callable[[Any], Any], density: Any) -> None:
    with complains("density must be in (0, 1]", repr(density)):
        method(density)


@pytest.mark.parametrize(
    ("method", "lowest"),
    [
        (dipnet.GLUPruning(0.5), "0.667"),
        (dipnet.GatePruning(0.3), "0.333"),
        (dipnet.UpPruning(0.3), "0.333"),
    ],
)
@gated_family
def test_density_below_the_methods_floor(family: str, method: Any, lowest: str) -> None:
    with complains("density must be above", lowest, "dip has no such limit"):
        dipnet.sparsify(shared(family), method)


def test_cats_floor_is_found_before_calibration() -> None:
    with complains("density must be above", "0.333"):
        dipnet.calibrate(shared("llama"), dipnet.CATS(0.3), CALIBRATION, window=WINDOW)


@pytest.mark.parametrize("config", [transformers.GPT2Config, transformers.BloomConfig])
def test_unknown_family(config: type[transformers.PretrainedConfig]) -> None:
    small = config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, hidden_size=8)
    model = transformers.AutoModelForCausalLM.from_config(small)
    parts = (repr(small.model_type), "docs/adding-a-family.md", *FAMILIES)
    with complains("unknown model family", *parts):
        dipnet.sparsify(model, dipnet.DIP(0.5))
    with complains("unknown model family", *parts):
        describe(model)
    with complains("unknown model family", *parts):
        dipnet.calibrate(model, dipnet.CATS(0.5), CALIBRATION)


@pytest.mark.parametrize("family", ["opt", "opt-350m"])
@pytest.mark.parametrize(
    "method", [dipnet.GatePruning(0.5), dipnet.UpPruning(0.5), dipnet.CATS(0.5)]
)
def test_a_method_that_needs_a_gate(family: str, method: Any) -> None:
    works = ("dip", "dip-threshold", "glu", "glu-oracle", "teal", "wina", "wanda")
    with complains(f"{method.name} needs a gated MLP", "opt", ", ".join(works)):
        dipnet.sparsify(shared(family), method)


def test_calibrating_a_method_that_needs_a_gate() -> None:
    with complains("cats needs a gated MLP"):
        dipnet.calibrate(shared("opt"), dipnet.CATS(0.5), CALIBRATION, window=WINDOW)


@pytest.mark.parametrize("method", [dipnet.CATS(0.5), dipnet.TEAL(0.5), dipnet.Wanda(0.5)])
def test_without_calibration(method: Any) -> None:
    with complains(f"{method.name} has to be calibrated", "dipnet.calibrate", "--calibration"):
        dipnet.sparsify(shared("llama"), method)


@pytest.mark.parametrize("tokens", [[], [[]], [5]])
def test_empty_calibration_text(tokens: list[Any]) -> None:
    text = torch.tensor(tokens, dtype=torch.long)
    with complains("calibration text is empty", "give at least"):
        dipnet.calibrate(shared("llama"), dipnet.CATS(0.5), text, window=WINDOW)


@pytest.mark.parametrize("window", [CONTEXT + 1, 1, 0, -1])
def test_calibration_window(window: int) -> None:
    with complains(f"window must be from 2 to the context of {CONTEXT}, got {window}"):
        dipnet.calibrate(shared("llama"), dipnet.CATS(0.5), CALIBRATION, window=window)


def test_pattern_at_another_density() -> None:
    with complains("pattern 2:4 has density 0.5, not 0.4"):
        dipnet.Wanda(0.4, "2:4")


@pytest.mark.parametrize("pattern", ["4:8", "", None, 24])
def test_unknown_pattern(pattern: Any) -> None:
    with complains(f"unknown pattern {pattern!r}", "unstructured, 2:4"):
        dipnet.Wanda(0.5, pattern)


@pytest.mark.parametrize("prefill", ["Dense", "", -1, 1.5, True, None, [3]])
def test_prefill(prefill: Any) -> None:
    with complains("prefill is 'dense', 'sparse' or a number of tokens", repr(prefill)):
        dipnet.sparsify(shared("llama"), dipnet.DIP(0.5), prefill=prefill)


@pytest.mark.parametrize("method", ["dip", dipnet.DIP, None, 0.5])
def test_not_a_method(method: Any) -> None:
    with complains("method is a method such as dipnet.DIP(density=0.5), not", repr(method)):
        dipnet.sparsify(shared("llama"), method)


@pytest.mark.parametrize("model", ["demo-swiglu", torch.nn.Linear(2, 2), None])
def test_not_a_model(model: Any) -> None:
    with complains("model is a transformers model, not", type(model).__name__):
        dipnet.sparsify(model, dipnet.DIP(0.5))


def test_a_model_without_layers() -> None:
    config = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=2)
    with complains("no layers", "num_hidden_layers"):
        dipnet.sparsify(transformers.LlamaForCausalLM(config), dipnet.DIP(0.5))


def test_usage_of_a_dense_model() -> None:
    with complains("not sparsified", "dipnet.sparsify(model, method)"):
        dipnet.usage(shared("llama"))
