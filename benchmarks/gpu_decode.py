"""Decoding on a GPU end to end: Hugging Face's, our dense loop and our sparse one.

    python benchmarks/gpu_decode.py [--model llama-3-8b] [--only "batch 4"] [--without hf-compiled]

Models of real shapes with random weights, in bfloat16 or as int4 columns of a store; 64 new tokens
after a prompt of 128, for one sequence or a batch. A step's time is what 64 more steps take, so
that the prompt is not in it; settings are measured one after the other, in each several times, and
each is printed when it is done. Hugging Face's compiled decoder gets the same static cache every
time, so that its graphs are captured once. The limit is what a step must read over the read
bandwidth that is measured in the same run: all weights, or those that the method's counts say were
kept, or, of a batch, what its sequences keep together where they choose independently. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import transformers
from gpu_timing import need_gpu, read_bandwidth
from timing import json_line, percent, print_table
from transformers import PreTrainedModel

import dipnet
from dipnet.kernels.gpu import Weight
from dipnet.methods.predictors import Kind, PredictedModel, Predictor, Predictors
from dipnet.models.decoding.packed import PackedColumns, put_packed
from dipnet.models.decoding.sharing import kept_together
from dipnet.models.families import Decoder
from dipnet.store.geometry import column_stride, padded_outputs

PROMPT, NEW, RANK = 128, 64, 1000
LENGTH = 256  # of Hugging Face's static cache, as of ours


def llama(layers: int = 32) -> PreTrainedModel:
    """Llama-3-8B's shapes, or those of a model of fewer layers."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    return random_model(config)


def opt(layers: int = 48) -> PreTrainedModel:
    """OPT-30B's shapes, or those of a model of fewer layers."""
    config = transformers.OPTConfig(
        vocab_size=50272,
        hidden_size=7168,
        word_embed_proj_dim=7168,
        ffn_dim=28672,
        num_hidden_layers=layers,
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

    build: Callable[..., PreTrainedModel]
    method: Callable[[PreTrainedModel], Any]


SUBJECTS = {"llama-3-8b": Subject(llama, dip), "opt-30b": Subject(opt, dejavu)}
HOWS = ("dense", "sparse", "hf-eager", "hf-compiled")
BYTES = {"bf16": 2, "int4": 1 / 2 + 1 / 32}
"""Of a weight; of int4, 32 share a multiplier of a byte."""


@dataclass(frozen=True)
class Setting:
    """One way to decode a model."""

    model: str
    how: str
    batch: int = 1
    weights: str = "bf16"

    @property
    def name(self) -> str:
        """What --only looks at."""
        parts = [self.model, self.how]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [self.weights] if self.weights != "bf16" else []
        return " ".join(parts)


SETTINGS = [
    *(Setting(model, how) for how in HOWS for model in SUBJECTS),
    *(Setting("llama-3-8b", how, batch) for batch in (4, 8) for how in ("dense", "sparse")),
    *(Setting("opt-30b", how, 4) for how in ("dense", "sparse")),
    *(Setting("llama-3-8b", how, weights="int4") for how in ("dense", "sparse")),
]


@dataclass
class Row:
    """What one setting gave; times in seconds a step."""

    setting: Setting
    read_bytes: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def put_int4(model: PreTrainedModel) -> PreTrainedModel:
    """Random int4 columns, as a store has them, in the place of all linear layers."""
    decoder = Decoder(model)
    stacks = (("q", "k", "v"), ("o",), decoder.spec.input_matrices, ("down",))
    for layer in range(decoder.spec.layers):
        for matrices in stacks:
            sizes = [decoder.spec.matrices[name] for name in matrices]
            put_packed(decoder, layer, *random_columns(matrices, sizes))
    head = tuple(model.get_output_embeddings().weight.shape)
    put_packed(decoder, None, *random_columns(("head",), [head]))
    return model


def random_columns(
    matrices: tuple[str, ...], sizes: list[tuple[int, ...]]
) -> tuple[dict[str, slice], PackedColumns]:
    """Where the outputs of matrices of these (outputs, inputs) are, and the columns."""
    rows, end = {}, 0
    for name, (outputs, _) in zip(matrices, sizes, strict=True):
        rows[name] = slice(end, end + outputs)
        end += outputs
    channels = sizes[0][1]
    stride = column_stride("int4", padded_outputs(end))
    data = torch.randint(256, (channels, stride), dtype=torch.uint8, device="cuda")
    scales = torch.full((channels,), 0.02 / (114 * 4.6), device="cuda")
    return rows, PackedColumns(Weight(data, scales, "int4", end))


def seconds_a_step(
    model: PreTrainedModel,
    batch: int,
    rounds: int,
    cache: transformers.StaticCache | None = None,
) -> list[float]:
    """The time of one decoded token of each sequence, in several rounds."""
    prompt = torch.randint(3, 1000, (batch, PROMPT), device="cuda")

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


def share_read(model: PreTrainedModel, method: Any, batch: int) -> float:
    """The share of all weights that a step of a sparsified model reads."""
    density, spec = dipnet.usage(model).density(), dipnet.describe(model)
    if batch == 1:
        return density.total
    dropped = 0.0
    for site in method.sites(spec):
        alone = 1 - kept_together(batch, site.density)
        dropped += alone * site.units * site.weights_per_unit
        groups, together = (
            site.units // site.group,
            1 - kept_together(batch * site.group, site.density),
        )
        dropped += together * groups * site.weights_per_group
    return 1 - dropped / spec.weights_per_token + density.added


def measure(setting: Setting, model: PreTrainedModel, rounds: int) -> Row:
    """One model in one setting."""
    row = Row(setting, dipnet.describe(model).weights_per_token * BYTES[setting.weights])
    batch = setting.batch
    if setting.how == "hf-compiled":
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        row.seconds = seconds_a_step(model, batch, rounds, cache)
    elif setting.how == "hf-eager":
        row.seconds = seconds_a_step(model, batch, rounds)
    else:
        method = dipnet.Dense() if setting.how == "dense" else SUBJECTS[setting.model].method(model)
        with dipnet.sparsify(model, method, backend="gpu", prefill="dense"):
            row.seconds = seconds_a_step(model, batch, rounds)
            row.read_bytes *= share_read(model, method, batch)
    milliseconds = row.median * 1e3
    print(f"{setting.name}: {milliseconds:.3f} ms, {row.read_bytes / 1e9:.3f} GB", flush=True)
    return row


def report(rows: list[Row], bandwidth: float) -> None:
    times = {row.setting: row.median for row in rows}
    others = [how for how in HOWS if how != "sparse"]

    def ratio(row: Row, other: str) -> str:
        base = times.get(replace(row.setting, how=other))
        return f"{base / row.median:.2f}" if base else ""

    table = []
    for row in sorted(rows, key=lambda row: (row.setting.model, row.setting.weights)):
        limit, rate = row.read_bytes / bandwidth, row.setting.batch / row.median
        figures = [f"{row.median * 1e3:.3f}", f"{rate:.1f}", f"{limit * 1e3:.3f}"]
        ratios = [ratio(row, other) for other in others]
        table.append([row.setting.name, *figures, percent(limit / row.median), *ratios])
    header = ["", "ms/step", "tok/s", "limit ms", "of limit", *(f"× {name}" for name in others)]
    print_table(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(SUBJECTS))
    parser.add_argument("--without", action="append", choices=HOWS, default=[])
    parser.add_argument("--only", action="append", help="settings whose names contain this")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    chosen = [
        setting
        for setting in SETTINGS
        if setting.model in (args.model or SUBJECTS)
        and setting.how not in args.without
        and any(part in setting.name for part in args.only or [""])
    ]
    need_gpu()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    models: dict[tuple[str, str], PreTrainedModel] = {}
    rows = []
    for setting in chosen:
        key = setting.model, setting.weights
        if key not in models:
            model = SUBJECTS[setting.model].build()
            models[key] = model if setting.weights == "bf16" else put_int4(model)
        rows.append(measure(setting, models[key], args.rounds))
    report(rows, bandwidth)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "read_bandwidth": bandwidth,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rows": [
            asdict(row.setting)
            | {"read_bytes": row.read_bytes, "seconds": row.seconds, "median_seconds": row.median}
            for row in rows
        ],
    }
    print(json_line(result))


if __name__ == "__main__":
    main()
