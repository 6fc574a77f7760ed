"""Decoding on a CPU without the dropped neurons and heads: Deja Vu against the dense model.

    python benchmarks/skipping.py [--models opt llama demo-relu demo-swiglu] [--threads N]

`opt` and `llama` have the widths of OPT-6.7B and Mistral-7B, two layers and random weights in
float32, far beyond any cache of the processor. Predictors are random, too: speed asks how many
units are kept, not which. Their time is in every figure, and their weights in every share. One
token after another at batch 1 and greedily; settings take turns within a round, and a ratio is the
median over paired rounds. `limit` is the share of the physical limit: the time to read once what a
token needs, at the bandwidth measured in the same round, over the token's time. The weights of the
bundled models fit into a processor's cache, so that their share may be above one. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import Rounds, dram_bandwidth, json_line, percent, print_table
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import dipnet
from dipnet.adapt.fit_settings import FitSettings
from dipnet.methods.base import Method
from dipnet.methods.predictors import KINDS, PredictedModel, Predictor, Predictors
from dipnet.models.load import DEMO_MODELS, load_model

VOCABULARY = 1024
PROMPT = 16
"""Tokens before the first that is decoded."""
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: OPTConfig(
        hidden_size=4096,
        word_embed_proj_dim=4096,
        ffn_dim=16384,
        num_attention_heads=32,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        dropout=0.0,
    ),
    "llama": lambda: MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        sliding_window=None,
    ),
}


def built(name: str) -> PreTrainedModel:
    """A bundled model, or a random one of a well-known width."""
    if name in DEMO_MODELS:
        return load_model(name, device="cpu").model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def random_predictors(model: PreTrainedModel) -> Predictors:
    """Predictors of the default ranks that know nothing."""
    spec = dipnet.describe(model)
    shape, settings = PredictedModel.of(spec), FitSettings()

    def one(units: int, rank: int) -> Predictor:
        made = torch.randn
        return Predictor(made(rank, spec.width), made(rank), made(units, rank), made(units))

    layers = {
        kind: [one(shape.units(kind), settings.rank_of(kind, spec)) for _ in range(spec.layers)]
        for kind in KINDS
    }
    return Predictors(shape, settings.look_ahead, layers)


def settings_of(model: PreTrainedModel, mlp: float, heads: float) -> dict[str, tuple[Method, str]]:
    """What is timed: a method and a backend by name; the first is the dense model."""
    known = random_predictors(model)

    def deja_vu(**densities: float) -> Method:
        return dipnet.DejaVu(**densities, predictors=known)

    both = deja_vu(mlp_density=mlp, head_density=heads)
    return {
        "dense": (dipnet.Dense(), "reference"),
        "masks": (both, "reference"),
        f"skip, {mlp:.0%} of neurons": (deja_vu(mlp_density=mlp), "skip"),
        f"skip, {heads:.0%} of heads": (deja_vu(head_density=heads), "skip"),
        "skip both": (both, "skip"),
    }


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: int, warmup: int) -> list[float]:
    """Seconds of each decoded token after the first ``warmup``."""
    cache = DynamicCache()
    step = torch.arange(PROMPT)[None]
    took = []
    for _ in range(1 + warmup + tokens):
        began = time.perf_counter()
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        step = logits[:, -1:].argmax(dim=-1)
        took.append(time.perf_counter() - began)
    return took[1 + warmup :]


def run(
    model: PreTrainedModel, method: Method, backend: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One setting's figures in one round."""
    weights = dipnet.describe(model).weights_per_token
    with dipnet.sparsify(model, method, backend=backend):
        seconds = statistics.median(decode(model, args.tokens, args.warmup))
        total = dipnet.usage(model).density().total
    bandwidth = dram_bandwidth(args.threads)
    needed = total * weights * model.dtype.itemsize
    return {
        "median_seconds": seconds,
        "total_density": total,
        "bandwidth": bandwidth,
        "limit_share": needed / bandwidth / seconds,
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Rounds]:
    """Every setting once a round."""
    model = built(name)
    settings = settings_of(model, args.mlp_density, args.head_density)
    results = {each: Rounds() for each in settings}
    for _ in range(args.rounds):
        for each, (method, backend) in settings.items():
            results[each].runs.append(run(model, method, backend, args))
    return results


def show(name: str, results: dict[str, Rounds]) -> dict[str, dict[str, float]]:
    """Print a model's table; its figures."""
    figures = ("median_seconds", "total_density", "limit_share", "bandwidth")
    found = {
        each: {figure: rounds.median(figure) for figure in figures}
        | {"against_dense": rounds.ratio(results["dense"])}
        for each, rounds in results.items()
    }
    rows = [
        (
            each,
            f"{1000 * row['median_seconds']:.2f}",
            f"{row['against_dense']:.2f}",
            f"{row['total_density']:.3f}",
            percent(row["limit_share"]),
        )
        for each, row in found.items()
    ]
    print()
    print_table((name, "ms/token", "x dense", "of all weights", "limit"), rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*CONFIGS, *DEMO_MODELS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--mlp-density", type=float, default=0.2)
    parser.add_argument("--head-density", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shown = {name: show(name, measure(name, args)) for name in args.models}
    result = {"benchmark": "skipping", "rounds": args.rounds, "threads": args.threads}
    print(json_line({**result, "models": shown}))


if __name__ == "__main__":
    main()
