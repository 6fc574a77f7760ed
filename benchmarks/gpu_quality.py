"""Perplexity through the GPU's kernels, token by token, against the reference's masks.

    python benchmarks/gpu_quality.py [--windows 32] [--method teal] [--weights int4] [--itself]

The bundled demo models read windows of the bundled held-out text: the reference whole windows at a
time, our decode loop one token after the other. Where two scores are all but equal, another order
of a sum can keep another unit, and every later token of that window differs a little; so it takes
many windows, and a difference comes with its standard error over them. What another order alone
does is shown by --itself: the reference token by token in the loop's place, which needs no GPU.
With --context reference every token finds the reference's keys and values of the tokens before, so
that differences do not add up, and fewer windows do (of Deja Vu, keys and values that skipped heads
lack are then never completed).

With --weights the linear layers are a store's columns, for the reference too, and all else is of
--dtype: so the kernels for 16-bit and integer weights are measured in float32. The weights read are
compared too. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import need_gpu
from timing import json_line, print_table
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

import dipnet
from dipnet.eval.texts import bundled_text, tokenize
from dipnet.models.attach import ATTACHED
from dipnet.pack.packing import pack
from dipnet.store.index import read_index
from dipnet.streaming.gpu.resident import resident

WINDOW = 256
CALIBRATION = 4096
MODELS = ("demo-swiglu", "demo-relu")


def dejavu(model: Any, tokens: Tensor) -> Any:
    """Predictors of one epoch."""
    fitted = dipnet.fit_predictors(model, tokens, window=128, epochs=1, rank=64)
    return dipnet.DejaVu(0.3, 0.5, predictors=fitted)


METHODS: dict[str, Callable[[Any, Tensor], Any]] = {
    "dejavu": dejavu,
    "dip": lambda model, tokens: dipnet.DIP(0.5, attention_density=0.5),
    "teal": lambda model, tokens: dipnet.calibrate(model, dipnet.TEAL(0.6), tokens),
    "gate": lambda model, tokens: dipnet.GatePruning(0.5),
    "cats": lambda model, tokens: dipnet.calibrate(model, dipnet.CATS(0.5), tokens),
    "dense": lambda model, tokens: dipnet.Dense(),
}
"""What decodes on a GPU, of every kind of mask, fitted on tokens where it needs that."""
GATED = {"gate", "cats"}
"""Those that a model without gates has not."""
OF_COLUMNS = {"dip", "teal", "dense"}
"""Those that a store's columns serve."""


def loaded(name: str, weights: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A bundled model and its tokenizer; with ``weights`` its linear layers are columns of them."""
    plain = dipnet.load_model(name, device=device, dtype=dtype)
    if weights is None:
        return plain.model, plain.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pack(name, store, weights)
        given = store, read_index(store), None, "sparse", torch.device(device)
        model = resident(*given, dtype=getattr(torch, dtype))
    dipnet.restore(model)
    return model, plain.tokenizer


def methods(model: Any, asked: list[str] | None, weights: str | None) -> list[str]:
    """Of those that are asked for, the ones that there are for a model."""
    without = set() if dipnet.describe(model).gated else GATED
    there = OF_COLUMNS if weights else set(METHODS) - without
    return [name for name in asked or METHODS if name in there]


Keys = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, of all tokens of a window."""


def losses(logits: Tensor, window: Tensor) -> Tensor:
    """(n, vocabulary) logits of all but the last of (n + 1,) tokens -> (n,) losses in nats."""
    return functional.cross_entropy(logits.float(), window[1:], reduction="none")


def by_reference(model: Any, window: Tensor, *, keep: bool) -> tuple[Tensor, Keys | None]:
    """The losses of all tokens but the first, the whole window at once."""
    cache = DynamicCache(config=model.config)
    made = losses(model(window[None], past_key_values=cache, use_cache=True).logits[0, :-1], window)
    return made, [(layer.keys, layer.values) for layer in cache.layers] if keep else None


def by_loop(model: Any, window: Tensor, before: Keys | None) -> Tensor:
    """The same, from the loop's logits of one token after the other.

    Each token finds the keys and values that the loop has made, or those of ``before``.
    """
    replay = getattr(model, ATTACHED).decoding.replay(len(window))
    cache, made = replay.begin(), []
    replay.prompt_ended(0)
    for position, token in enumerate(window[:-1, None]):
        if before is not None:
            replay.prompt_ended(position)
            put(cache, before, slice(max(position - 1, 0), position))
        made.append(replay.run(token).clone())
    return losses(torch.cat(made), window)


def put(cache: Any, before: Keys, at: slice) -> None:
    """Let a static cache hold these keys and values at some positions."""
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        layer.keys[:, :, at] = keys[:, :, at]
        layer.values[:, :, at] = values[:, :, at]


def by_reference_in_steps(model: Any, window: Tensor, before: Keys | None) -> Tensor:
    """The same, by the reference, one token after the other."""
    cache, made = DynamicCache(config=model.config), []
    for position, token in enumerate(window[None, :-1].split(1, dim=1)):
        if before is not None and position:
            until = [(keys[:, :, :position], values[:, :, :position]) for keys, values in before]
            cache = DynamicCache(until, config=model.config)
        made.append(model(token, past_key_values=cache, use_cache=True).logits[:, 0])
    return losses(torch.cat(made), window)


STEPS = {"gpu": by_loop, "itself": by_reference_in_steps}
"""The ways to a window's losses that are compared with the reference's."""


@torch.no_grad()
def compared(
    name: str, model: Any, method: Any, windows: list[Tensor], way: str, *, anew: bool
) -> dict[str, Any]:
    """A method's perplexity by the reference and another way, and by what share that is higher."""
    with dipnet.sparsify(model, method, backend="reference"):
        known = [by_reference(model, window, keep=anew) for window in windows]
        share = dipnet.usage(model).density().total
    with dipnet.sparsify(model, method, backend="gpu" if way == "gpu" else "reference"):
        there = [
            STEPS[way](model, window, keys)
            for window, (_, keys) in zip(windows, known, strict=True)
        ]
        found_share = dipnet.usage(model).density().total
    reference, found = (
        torch.stack([each.double().mean() for each in made]).cpu()
        for made in ([each for each, _ in known], there)
    )
    more = found - reference
    row = {
        "model": name,
        "method": method.name,
        "reference": math.exp(float(reference.mean())),
        "found": math.exp(float(found.mean())),
        "difference": math.expm1(float(more.mean())),
        "error": float(more.std()) / math.sqrt(len(more)),
        "share": share,
        "found_share": found_share,
    }
    print(f"{name} {method.name}: {row['reference']:.4f} {row['found']:.4f}", flush=True)
    return row


def report(rows: list[dict[str, Any]], way: str) -> float:
    """Print the table, and return the largest difference."""
    header = ["", "reference", way, "difference", "its error", "weights read", "there"]
    table = [
        [
            f"{row['model']} {row['method']}",
            f"{row['reference']:.4f}",
            f"{row['found']:.4f}",
            f"{row['difference']:+.4%}",
            f"{row['error']:.4%}",
            f"{row['share']:.5f}",
            f"{row['found_share']:.5f}",
        ]
        for row in rows
    ]
    print_table(header, table)
    worst = max(abs(row["difference"]) for row in rows)
    print(f"largest difference {worst:.4%} (at most 0.1 % wanted)")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--method", action="append", choices=METHODS, help="not all, but this")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--weights", choices=["bf16", "int8", "int4"], help="a store's columns")
    parser.add_argument("--context", choices=["own", "reference"], default="own")
    parser.add_argument("--itself", action="store_true", help="the reference in another order")
    args = parser.parse_args()
    if not args.itself:
        need_gpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    way, rows = "itself" if args.itself else "gpu", []
    for name in args.model or MODELS:
        model, tokenizer = loaded(name, args.weights, args.dtype, device)
        fitting = tokenize(tokenizer, bundled_text("calibration").content)[:CALIBRATION]
        text = tokenize(tokenizer, bundled_text("heldout").content).to(model.device)
        windows = list(text[: args.windows * WINDOW].split(WINDOW))
        for chosen in methods(model, args.method, args.weights):
            method = METHODS[chosen](model, fitting.to(model.device))
            anew = args.context == "reference"
            rows.append(compared(name, model, method, windows, way, anew=anew))
    if not rows:
        raise SystemExit(f"error: {', '.join(args.method)} serve no such model or weights")
    where = torch.cuda.get_device_name() if device == "cuda" else device
    named = {"way": way, "device": where, "dtype": args.dtype, "context": args.context}
    named |= {"weights": args.weights or args.dtype, "windows": args.windows, "window": WINDOW}
    print(json_line(named | {"rows": rows, "largest_difference": report(rows, way)}))


if __name__ == "__main__":
    main()
