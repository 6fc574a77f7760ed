"""Decoding on a GPU end to end, batch 1: Hugging Face's, our dense loop and our sparse one.

    python benchmarks/gpu_decode.py [--model llama-3-8b] [--without hf-compiled] [--rounds 5]

Models of real shapes with random bfloat16 weights; 64 new tokens after a prompt of 128. A token's
time is what 64 more tokens take, so that the prompt is not in it; settings are measured one after
the other, in each several times, and each is printed when it is done. Hugging Face's compiled
decoder gets the same static cache every time, so that its graphs are captured once. The limit is
what a token must read over the read bandwidth that is measured in the same run: all weights, or
those that the method's counts say were kept. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from timing import json_line, percent, print_table
from transformers import PreTrainedModel

import dipnet
from dipnet.methods.predictors import Kind, PredictedModel, Predictor, Predictors

PROMPT, NEW, RANK = 128, 64, 1000
LENGTH = 256  # of Hugging Face's static cache, as of ours


def llama() -> PreTrainedModel:
    """Llama-3-8B's shapes."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    return random_model(config)


def opt() -> PreTrainedModel:
    """OPT-30B's shapes."""
    config = transformers.OPTConfig(
        vocab_size=50272,
        hidden_size=7168,
        word_embed_proj_dim=7168,
        ffn_dim=28672,
        num_hidden_layers=48,
        num_attention_heads=56,
        max_position_embeddings=2048,
    )
    return random_model(config)


def random_model(config: Any) -> PreTrainedModel:
    config.eos_token_id = None
    with torch.device("cuda"):  # every weight is drawn there
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def dip(_model: PreTrainedModel) -> dipnet.DIP:
    return dipnet.DIP(0.5, attention_density=0.5)


def dejavu(model: PreTrainedModel) -> dipnet.DejaVu:
    """A tenth of the neurons and half of the heads, by random predictors in bfloat16."""
    shape = PredictedModel.of(dipnet.describe(model))

    def predictor(kind: Kind) -> Predictor:
        units = shape.units(kind)
        sizes = (RANK, shape.width), (RANK,), (units, RANK), (units,)
        options: Any = {"device": "cuda", "dtype": torch.bfloat16}
        return Predictor(*(torch.randn(*size, **options) for size in sizes))

    layers: Any = {kind: [predictor(kind) for _ in range(shape.layers)] for kind in ("mlp", "head")}
    return dipnet.DejaVu(0.1, 0.5, predictors=Predictors(shape, 1, layers))


@dataclass(frozen=True)
class Subject:
    """A model, and the method that it is decoded with."""

    build: Callable[[], PreTrainedModel]
    method: Callable[[PreTrainedModel], Any]


SUBJECTS = {"llama-3-8b": Subject(llama, dip), "opt-30b": Subject(opt, dejavu)}
SETTINGS = ("dense", "sparse", "hf-eager", "hf-compiled")


@dataclass
class Row:
    """What one setting of a model gave; times in seconds."""

    model: str
    setting: str
    read_bytes: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def read_bandwidth(size: int = 1 << 33, tries: int = 10) -> float:
    """Bytes per second of a large sum: the median of some."""
    values = torch.ones(size // 4, dtype=torch.float32, device="cuda")
    values.sum()
    rates = []
    for _ in range(tries):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        values.sum()
        end.record()
        end.synchronize()
        rates.append(size / begin.elapsed_time(end) * 1000)
    return statistics.median(rates)


def seconds_a_token(
    model: PreTrainedModel, rounds: int, cache: transformers.StaticCache | None = None
) -> list[float]:
    """The time of one decoded token, in several rounds."""
    prompt = torch.randint(3, 1000, (1, PROMPT), device="cuda")

    def generate(tokens: int) -> float:
        if cache is not None:
            cache.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            past_key_values=cache,
        )
        torch.cuda.synchronize()
        assert ids.shape[1] == PROMPT + tokens
        return time.perf_counter() - start

    for _ in range(2):  # kernels are compiled, graphs captured
        generate(NEW + 1)
    return [(generate(NEW + 1) - generate(1)) / NEW for _ in range(rounds)]


def dense_bytes(model: PreTrainedModel) -> float:
    """Bytes that the dense model reads for a token."""
    return dipnet.describe(model).weights_per_token * model.dtype.itemsize


def measure(name: str, model: PreTrainedModel, setting: str, rounds: int) -> Row:
    """One model in one setting."""
    row = Row(name, setting, dense_bytes(model))
    if setting == "hf-compiled":
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        row.seconds = seconds_a_token(model, rounds, cache)
    elif setting == "hf-eager":
        row.seconds = seconds_a_token(model, rounds)
    else:
        method = dipnet.Dense() if setting == "dense" else SUBJECTS[name].method(model)
        with dipnet.sparsify(model, method, backend="gpu", prefill="dense"):
            row.seconds = seconds_a_token(model, rounds)
            row.read_bytes *= dipnet.usage(model).density().total
    print(f"{name} {setting}: {row.median * 1e3:.3f} ms, {row.read_bytes / 1e9:.3f} GB", flush=True)
    return row


def report(rows: list[Row], bandwidth: float) -> None:
    times = {(row.model, row.setting): row.median for row in rows}
    others = [setting for setting in SETTINGS if setting != "sparse"]

    def ratio(row: Row, other: str) -> str:
        base = times.get((row.model, other))
        return f"{base / row.median:.2f}" if base else ""

    table = []
    for row in sorted(rows, key=lambda row: row.model):
        limit = row.read_bytes / bandwidth
        figures = [f"{row.median * 1e3:.3f}", f"{1 / row.median:.1f}", f"{limit * 1e3:.3f}"]
        ratios = [ratio(row, other) for other in others]
        table.append([f"{row.model} {row.setting}", *figures, percent(limit / row.median), *ratios])
    header = ["", "ms/token", "tok/s", "limit ms", "of limit", *(f"× {name}" for name in others)]
    print_table(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(SUBJECTS))
    parser.add_argument("--without", action="append", choices=SETTINGS, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    models = {name: SUBJECTS[name].build() for name in args.model or SUBJECTS}
    rows = [
        measure(name, model, setting, args.rounds)
        for setting in SETTINGS
        if setting not in args.without
        for name, model in models.items()
    ]
    report(rows, bandwidth)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "read_bandwidth": bandwidth,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rows": [vars(row) | {"median_seconds": row.median} for row in rows],
    }
    print(json_line(result))


if __name__ == "__main__":
    main()
