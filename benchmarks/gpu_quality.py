"""Perplexity through the GPU's kernels, token by token, against the reference's masks.

    python benchmarks/gpu_quality.py [--windows 32] [--dtype float32] [--method teal] [--itself]

The bundled demo models read windows of the bundled held-out text: the reference whole windows at a
time, our decode loop one token after the other. Where two scores are all but equal, another order
of a sum can keep another unit, and every later token of that window differs a little; so it takes
many windows, and a difference comes with its standard error over them. What another order alone
does is shown by --itself: the reference token by token in the loop's place, which needs no GPU. The
weights read are compared too. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
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


@torch.no_grad()
def by_reference(model: Any, window: Tensor) -> Tensor:
    """(n,) tokens -> (n - 1,) losses of all but the first."""
    logits = model(window[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), window[1:], reduction="none")


@torch.no_grad()
def by_loop(model: Any, window: Tensor) -> Tensor:
    """The same, from the loop's logits of one token after the other."""
    replay = getattr(model, ATTACHED).decoding.replay(len(window))
    replay.begin()
    replay.prompt_ended(0)
    made = [replay.run(token).clone() for token in window[:-1, None]]
    return functional.cross_entropy(torch.cat(made).float(), window[1:], reduction="none")


@torch.no_grad()
def by_reference_in_steps(model: Any, window: Tensor) -> Tensor:
    """The same, by the reference, one token after the other."""
    cache = DynamicCache(config=model.config)
    steps = window[None, :-1].split(1, dim=1)
    made = [model(step, past_key_values=cache, use_cache=True).logits[:, 0] for step in steps]
    return functional.cross_entropy(torch.cat(made).float(), window[1:], reduction="none")


LOSSES = {"reference": by_reference, "gpu": by_loop, "itself": by_reference_in_steps}
"""The ways to a window's losses."""


def measured(model: Any, method: Any, windows: list[Tensor], way: str) -> tuple[Tensor, float]:
    """(windows,) mean losses in nats, and the share of all weights that was read for a token."""
    losses = LOSSES[way]
    with dipnet.sparsify(model, method, backend="gpu" if way == "gpu" else "reference"):
        means = torch.stack([losses(model, window).double().mean() for window in windows])
        return means.cpu(), dipnet.usage(model).density().total


def compared(name: str, model: Any, method: Any, windows: list[Tensor], way: str) -> dict[str, Any]:
    """A method's perplexity by the reference and another way, and by what share that is higher."""
    reference, share = measured(model, method, windows, "reference")
    found, found_share = measured(model, method, windows, way)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--method", action="append", choices=METHODS, help="not all, but this")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--itself", action="store_true", help="the reference in another order")
    args = parser.parse_args()
    if not args.itself:
        need_gpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    way, rows = "itself" if args.itself else "gpu", []
    for name in args.model or MODELS:
        loaded = dipnet.load_model(name, device=device, dtype=args.dtype)
        model = loaded.model
        fitting = tokenize(loaded.tokenizer, bundled_text("calibration").content)[:CALIBRATION]
        text = tokenize(loaded.tokenizer, bundled_text("heldout").content).to(model.device)
        windows = list(text[: args.windows * WINDOW].split(WINDOW))
        without = set() if dipnet.describe(model).gated else GATED
        for chosen in [each for each in args.method or METHODS if each not in without]:
            method = METHODS[chosen](model, fitting.to(model.device))
            rows.append(compared(name, model, method, windows, way))
    if not rows:
        raise SystemExit(f"error: no gates to prune by ({', '.join(args.method)}) in this model")
    header = ["", "reference", way, "difference", "its error", "weights read", "there"]
    print_table(
        header,
        [
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
        ],
    )
    worst = max(abs(row["difference"]) for row in rows)
    print(f"largest difference {worst:.4%} (at most 0.1 % wanted)")
    result = {"dtype": args.dtype, "windows": args.windows, "window": WINDOW, "rows": rows}
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(json_line(result | {"way": way, "device": where, "largest_difference": worst}))


if __name__ == "__main__":
    main()
