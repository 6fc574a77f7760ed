"""The methods' half of the test matrix, and the matrix itself: every method on every family.

A new method needs one line in `METHODS`, and a reference of its own if no other's fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dipnet
from dipnet.methods.allocation import Shapes
from dipnet.methods.base import Method
from dipnet.units import ModelSpec
from tests.families import FAMILIES, random_tokens, shared, tiny
from tests.predicted import (
    oracle_heads,
    oracle_mlp,
    predicted_heads,
    predicted_mlp,
    predictors,
    random_heads,
    random_mlp,
)
from tests.reference import Choice, HeadChoice, PlainLayer, Rule, exceeding, install, top

CALIBRATION = random_tokens(96, seed=7)
WINDOW = 24

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
"""Two orders of summation in float64; a single unit more or less is far outside."""


# --- references: which channels the attention projections keep ---


def all_channels(_layer: PlainLayer, _method: Any, _site: str, x: Tensor) -> list[int]:
    return list(range(len(x)))


def top_channels(_layer: PlainLayer, method: Any, _site: str, x: Tensor) -> list[int]:
    return top(x.abs(), method.attention_density)


def allocated_channels(layer: PlainLayer, method: Any, site: str, x: Tensor) -> list[int]:
    return top(x.abs(), method.allocated.points[0].sites[site][layer.number])


def weighed_channels(layer: PlainLayer, method: Any, site: str, x: Tensor) -> list[int]:
    norms = column_norms(layer, *("o" if site == "attn.out" else "qkv"))
    return top(x.abs() * norms, method.attention_density)


def exceeding_channels(layer: PlainLayer, method: Any, site: str, x: Tensor) -> list[int]:
    return exceeding(x.abs(), method.thresholds[layer.number, site])


# --- MLPs; densities by the formulas of the DIP paper's table ---


def dense(layer: PlainLayer, _method: Any, x: Tensor) -> Tensor:
    return layer.apply("down", layer.hidden(x))


def glu(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    share = 3 * method.density - 2 if layer.gated else 2 * method.density - 1
    hidden = layer.hidden(x)
    return layer.down(hidden, top(hidden.abs(), share))


def gate(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    gates = layer.activation(layer.apply("gate", x))
    kept = top(gates.abs(), (3 * method.density - 1) / 2)
    return layer.apply("down", gates[kept] * layer.apply("up", x, outputs=kept), inputs=kept)


def up(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    ups = layer.apply("up", x)
    kept = top(ups.abs(), (3 * method.density - 1) / 2)
    gates = layer.activation(layer.apply("gate", x, outputs=kept))
    return layer.apply("down", ups[kept] * gates, inputs=kept)


def oracle(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    kept = top(layer.uncounted().hidden(x).abs(), method.density)
    return layer.apply("down", layer.hidden(x, outputs=kept), inputs=kept)


def cett(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    output_norms = layer.uncounted().hidden(x).abs() * column_norms(layer, "down")
    kept = top(output_norms, method.density)
    return layer.apply("down", layer.hidden(x, outputs=kept), inputs=kept)


def cats(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    gates = layer.activation(layer.apply("gate", x))
    kept = exceeding(gates.abs(), method.thresholds[layer.number, "mlp.hidden"])
    return layer.apply("down", gates[kept] * layer.apply("up", x, outputs=kept), inputs=kept)


def dip(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    input_density, hidden_density = _dip_densities(layer, method)
    channels = top(x.abs(), input_density)
    hidden = layer.hidden(x[channels], inputs=channels)
    return layer.down(hidden, top(hidden.abs(), hidden_density))


def dip_blocks(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    input_density, hidden_density = _dip_densities(layer, method)
    channels = top(x.abs(), input_density)
    hidden = layer.hidden(x[channels], inputs=channels)
    size = method.hidden_block
    norms = [math.sqrt(sum(h * h for h in part.tolist())) for part in hidden.split(size)]
    blocks = top(torch.tensor(norms, dtype=torch.float64), hidden_density)
    return layer.down(hidden, [block * size + i for block in blocks for i in range(size)])


def dip_allocated(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    shares = {name: each[layer.number] for name, each in method.allocated.points[0].sites.items()}
    channels = top(x.abs(), shares["mlp.in"])
    hidden = layer.hidden(x[channels], inputs=channels)
    return layer.down(hidden, top(hidden.abs(), shares["mlp.hidden"]))


def dip_scored(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    input_density, hidden_density = _dip_densities(layer, method)
    first, second = (
        torch.tensor(method.factors.values[layer.number, site].tolist(), dtype=torch.float64)
        for site in ("mlp.in", "mlp.hidden")
    )
    channels = top(x.abs() * first, input_density)
    hidden = layer.hidden(x[channels], inputs=channels)
    return layer.down(hidden, top(hidden.abs() * second, hidden_density))


def wina(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    input_density, hidden_density = _dip_densities(layer, method)
    channels = top(x.abs() * column_norms(layer, *layer.input_matrices), input_density)
    hidden = layer.hidden(x[channels], inputs=channels)
    return layer.down(hidden, top(hidden.abs() * column_norms(layer, "down"), hidden_density))


def teal(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    channels = exceeding(x.abs(), method.thresholds[layer.number, "mlp.in"])
    hidden = layer.hidden(x[channels], inputs=channels)
    kept = exceeding(hidden.abs(), method.thresholds[layer.number, "mlp.hidden"])
    return layer.down(hidden, kept)


def wanda(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    def product(matrix: str, values: Tensor) -> Tensor:
        rows = method.masks[layer.number, matrix].tolist()
        kept = [[j for j, keep in enumerate(row) if keep] for row in rows]
        return torch.cat(
            [layer.apply(matrix, values[k], inputs=k, outputs=[i]) for i, k in enumerate(kept)]
        )

    hidden = product("up", x)
    if layer.gated:
        hidden = hidden * layer.activation(product("gate", x))
    else:
        hidden = layer.activation(hidden)
    return product("down", hidden)


def _dip_densities(layer: PlainLayer, method: Any) -> tuple[float, float]:
    """The two masks' densities: explicit, or on the curve through the documented split."""
    if method.density is None:
        return method.input_density, method.hidden_density
    inputs = len(layer.input_matrices)
    hidden = method.density**method.split
    return ((inputs + 1) * method.density - hidden) / inputs, hidden


def column_norms(layer: PlainLayer, *matrices: str) -> Tensor:
    """(inputs,) the L2 norm of each column over all the matrices that share the input."""
    columns = zip(*(layer.weights[name].T.tolist() for name in matrices), strict=True)
    norms = [math.sqrt(sum(w * w for part in parts for w in part)) for parts in columns]
    return torch.tensor(norms, dtype=torch.float64)


# --- the table ---


@dataclass(frozen=True)
class Case:
    """A method to test: ``mlp``, and ``attention`` or ``heads``, are its reference in plain loops.

    ``predicted`` are options of the predictors that it needs; ``fitted`` makes the method itself
    for a model's shapes.
    """

    method: Method
    mlp: Rule
    attention: Choice = all_channels
    heads: HeadChoice | None = None
    predicted: dict[str, Any] | None = None
    fitted: Callable[[ModelSpec], Method] | None = None


def allocated(spec: ModelSpec, *, attention: bool = False) -> dipnet.DIP:
    """A method whose sites have densities of their own, and the density that they come to."""
    sites = dipnet.DIP(0.5, attention_density=0.5 if attention else None).sites(spec)
    shares = {
        (site.layer, site.name): 0.3 + 0.1 * ((3 * number + site.layer) % 5)
        for number, site in enumerate(sites)
    }
    weights = {(site.layer, site.name): site.units * site.weights_per_unit for site in sites}
    density = sum(weights[key] * shares[key] for key in shares) / sum(weights.values())
    return dipnet.DIP(density, allocation=dipnet.Allocation.of(spec, {density: shares}, {}))


def scored(spec: ModelSpec) -> dipnet.DIP:
    """A method with a factor for every channel, some of them large."""
    draws = torch.Generator().manual_seed(0)
    values = {
        (site.layer, site.name): torch.randn(site.channels, generator=draws).exp()
        for site in dipnet.DIP(0.5).sites(spec)
    }
    return dipnet.DIP(0.5, split=1.3, scores=dipnet.Factors(Shapes.of(spec), values))


METHODS = {
    "dense": Case(dipnet.Dense(), dense),
    "dip": Case(dipnet.DIP(0.5, split=1.3), dip),
    "dip-explicit": Case(dipnet.DIP(input_density=0.6, hidden_density=0.3), dip),
    "dip-attention": Case(dipnet.DIP(0.4, split=1.1, attention_density=0.6), dip, top_channels),
    "dip-blocks": Case(dipnet.DIP(0.5, split=1.3, hidden_block=4), dip_blocks),
    "dip-allocation": Case(
        dipnet.DIP(0.5),
        dip_allocated,
        allocated_channels,
        fitted=partial(allocated, attention=True),
    ),
    "dip-scores": Case(dipnet.DIP(0.5), dip_scored, fitted=scored),
    "dip-threshold": Case(dipnet.DIPThreshold(0.5, split=1.3), teal),
    "glu": Case(dipnet.GLUPruning(0.8), glu),
    "gate": Case(dipnet.GatePruning(0.5), gate),
    "up": Case(dipnet.UpPruning(0.6), up),
    "glu-oracle": Case(dipnet.GLUOracle(0.3), oracle),
    "cats": Case(dipnet.CATS(0.5), cats),
    "teal": Case(dipnet.TEAL(0.7), teal, exceeding_channels),
    "teal-mlp": Case(dipnet.TEAL(0.6, attention=False), teal),
    "wina": Case(dipnet.WINA(0.5, split=1.3, attention_density=0.7), wina, weighed_channels),
    "wanda": Case(dipnet.Wanda(0.6), wanda),
    "wanda-2:4": Case(dipnet.Wanda(0.5, "2:4"), wanda),
    "cett": Case(dipnet.CETT(0.3), cett),
    "dejavu": Case(
        dipnet.DejaVu(0.4, 0.6),
        predicted_mlp,
        heads=predicted_heads,
        predicted={},
    ),
    "dejavu-heads": Case(
        dipnet.DejaVu(head_density=0.4, look_ahead=2, dense_first=1),
        predicted_mlp,
        heads=predicted_heads,
        predicted={"look_ahead": 2, "kinds": ("head",), "activation": "relu"},
    ),
    "dejavu-scores": Case(
        dipnet.DejaVu(0.4, look_ahead=0, allocation="scores"),
        predicted_mlp,
        predicted={"look_ahead": 0, "kinds": ("mlp",)},
    ),
    "dejavu-oracle": Case(dipnet.DejaVuOracle(0.3, 0.6), oracle_mlp, heads=oracle_heads),
    "random": Case(dipnet.RandomMasks(0.4, 0.6), random_mlp, heads=random_heads),
}

# --- the matrix ---

PAIRS = [
    pytest.param(family, name, id=f"{family}-{name}")
    for name, case in METHODS.items()
    for family in FAMILIES
    if not (case.method.needs_gate and family.startswith("opt"))
]
every_pair = pytest.mark.parametrize(("family", "method"), PAIRS)


def of_family(family: str, name: str) -> Method:
    """The method, with what is fitted on the family's model where it needs that."""
    case = METHODS[name]
    if case.fitted is not None:
        return case.fitted(dipnet.describe(shared(family)))
    if case.predicted is None:
        return case.method
    return dataclasses.replace(case.method, predictors=predictors(family, **case.predicted))


@cache
def calibrated(family: str, name: str) -> Method:
    """The method as the family's tiny model needs it."""
    return dipnet.calibrate(shared(family), of_family(family, name), CALIBRATION, window=WINDOW)


def sparse(
    family: str, name: str, dtype: torch.dtype = torch.float64, **options: Any
) -> PreTrainedModel:
    """The family's shared model, sparsified with the method: use it in a ``with``."""
    return dipnet.sparsify(shared(family, dtype), calibrated(family, name), **options)


def plain(family: str, name: str) -> tuple[PreTrainedModel, list[PlainLayer]]:
    """A fresh model of the family that computes the method by the reference's loops."""
    model, case = tiny(family), METHODS[name]
    layers = install(model, calibrated(family, name), case.mlp, case.attention, case.heads)
    return model, layers


def at_density_one(method: Method) -> Method:
    """The method with every density that it was given set to 1."""
    fields = [field.name for field in dataclasses.fields(method) if "density" in field.name]
    given = {name: 1.0 for name in fields if getattr(method, name) is not None}
    return dataclasses.replace(method, **given)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models on many threads only wait for one another; imported by conftest files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **arguments: Any) -> Tensor:
    return model(tokens, **arguments).logits


@contextmanager
def linear_inputs(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """What reaches each linear layer after pruning: a list for each, of a tensor for each call."""
    seen: list[list[Tensor]] = []
    handles = []
    for layer in model.get_decoder().layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                calls: list[Tensor] = []
                seen.append(calls)
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, calls=calls: calls.append(args[0].detach())
                    )
                )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
