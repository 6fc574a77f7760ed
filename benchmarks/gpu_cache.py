"""A model larger than a set limit of the GPU's memory: records in the host's, HBM as their cache.

    python benchmarks/gpu_cache.py [--layers 32] [--weights int4] [--shares 0.5 0.25] [--rounds 3]

Llama-3-8B's shapes with random weights, batch 1. The limit is what the model needs beside the MLP
and a share of the MLP's records; PyTorch is forbidden to take more of the GPU. Dense decoding
streams what is not cached; DIP reads half of the MLP; DIP-CA prefers what is cached. Random
weights have no habits: hit rates are what the cache's size gives DIP, and a real model's are
higher. A token's time is what the later ones of a text take, so that the prompt is not in it. The
limit of a token is the longer one of two times: its bytes over the link at the link's bandwidth,
and its bytes in HBM at HBM's, both measured in the same run. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from gpu_timing import DEVICE, graph_us, need_gpu, read_bandwidth
from timing import json_line, percent, print_table
from torch import nn
from transformers import PreTrainedModel

import dipnet
from dipnet.kernels.gpu.cache import access, fetch, make_cache
from dipnet.methods.base import Method
from dipnet.models.families import Decoder
from dipnet.pack.plan import groups_of
from dipnet.store.geometry import Weights
from dipnet.store.index import Group, Index
from dipnet.streaming.budget import CACHED
from dipnet.streaming.gpu.budget import DeviceNeeds
from dipnet.streaming.gpu.choices import SiteChoice
from dipnet.streaming.gpu.embedding import HostEmbedding
from dipnet.streaming.gpu.load import Bounds, place
from dipnet.streaming.gpu.records import Records, pin
from dipnet.streaming.methods import fitted_method

PROMPT, CONTEXT = 16, 256
NO_FOLDER = Path()
"""Random records are in none."""
METHODS: dict[str, Method] = {
    "dense": dipnet.Dense(),
    "dip": dipnet.DIP(0.5),
    "dip-ca": dipnet.DIP(0.5, cache_aware=0.2),
}
COLUMNS = ("", "cache", "ms/token", "tokens/s", "hits", "MB/token", "of the limit", "GPU peak")


@dataclass
class Row:
    """What one setting gave; seconds and bytes are a token's."""

    method: str
    share: float
    memory_limit: int
    link_bytes: float = 0.0
    hbm_bytes: float = 0.0
    hit_rate: float | None = None
    peak_memory: int = 0
    limit_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def of_limit(self) -> float:
        return self.limit_seconds / self.median


def skeleton(layers: int) -> PreTrainedModel:
    """Llama-3-8B without its matrices."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        eos_token_id=None,
    )
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    return model.eval()


def random_records(group: Group, weights: Weights, device: torch.device) -> Records:
    """Records whose products keep the size of what they multiply."""
    spread = group.channels**-0.5
    shape = group.channels, group.stride
    if weights == "bf16":
        numbers = spread * torch.randn(shape[0], shape[1] // 2, device=device)
        return Records(group, weights, numbers.bfloat16().view(torch.uint8).cpu(), None)
    columns = torch.randint(256, shape, dtype=torch.uint8, device=device)
    level = {"int4": 4.6, "int8": 74.0}[weights]  # the spread of a level; 74 is a multiplier's
    scales = torch.full((group.channels,), spread / level / 74)
    return Records(group, weights, columns.cpu(), scales)


class Subject:
    """The random model: its records are made once, its caches for every setting anew."""

    def __init__(self, layers: int, weights: Weights, device: torch.device) -> None:
        self.layers, self.device = layers, device
        model = skeleton(layers)
        decoder = Decoder(model)
        head = model.get_output_embeddings()
        shape = head.out_features, head.in_features
        groups = groups_of(decoder, shape, weights, "auto", "column")
        self.index = Index(
            weights=weights,
            family=decoder.spec.family,
            activation=decoder.spec.activation,
            layers=layers,
            context=CONTEXT,
            source="random",
            neurons_permuted=False,
            records_bytes=groups[-1].end,
            rest_bytes=0,
            rest_sha256="0" * 64,
            groups=tuple(groups),
        )
        self.records = [random_records(group, weights, device) for group in groups]
        self.table = torch.empty(shape, dtype=torch.bfloat16).normal_()

    def load(self, method: Method, memory: int) -> PreTrainedModel:
        """The model inside a limit."""
        model = skeleton(self.layers)
        decoder = Decoder(model)
        fitted = fitted_method(method, NO_FOLDER, self.index, decoder.spec)
        table = HostEmbedding(self.table, 1.0, torch.bfloat16, self.device)
        model.get_decoder().embed_tokens = table
        bounds = Bounds(self.device, memory, None, CONTEXT, "lfu", "wanted")
        return place(self.index, self.records.__getitem__, decoder, fitted, "dense", bounds)

    def unit_bytes(self, name: str) -> int:
        """Of a record as it goes over the link."""
        group = self.index.group(0, name)
        return group.block * group.stride

    @property
    def mlp_bytes(self) -> int:
        """Of the records that may be streamed, as a store counts them."""
        return sum(group.bytes for group in self.index.groups if group.name in CACHED)

    def limit(self, method: Method, share: float) -> int:
        """The limit that leaves a share of the MLP for the caches."""
        model = skeleton(self.layers)
        decoder = Decoder(model)
        fitted = fitted_method(method, NO_FOLDER, self.index, decoder.spec)
        choices: Any = {
            (site.layer, site.name): SiteChoice(site, fitted) for site in fitted.sites(decoder.spec)
        }
        needs = DeviceNeeds.of(self.index, model, choices, CONTEXT, 2)
        return needs.total + int(share * self.mlp_bytes)

    def touched(self, model: PreTrainedModel) -> float:
        """Bytes that a token reads in HBM: attention, the head, the MLP's wanted columns."""
        density = dipnet.usage(model).density().sites
        return sum(
            group.channels * group.stride * density.get(f"{group.layer}.{group.name}", 1.0)
            for group in self.index.groups
        )


def link_bandwidths(subject: Subject) -> dict[str, float]:
    """Bytes per second from the host's memory: a copy's, and those of records in random order."""
    host = pin(torch.empty(1 << 30, dtype=torch.uint8))
    there = torch.empty_like(host, device=DEVICE)
    found = {"copy": host.nbytes / graph_us(lambda _: there.copy_(host, non_blocking=True), 2)}
    for name in CACHED[:2]:
        group = subject.index.group(0, name)
        width = group.block * group.stride
        source, into = (
            memory.view(-1)[: (1 << 29) // width * width].view(-1, width)
            for memory in (host, there)
        )
        rows = torch.arange(len(into), dtype=torch.int32, device=DEVICE)
        units = rows[torch.randperm(len(rows), device=DEVICE)]
        count = torch.full_like(rows[:1], len(rows))
        given = source, units, rows, count, into
        found[f"records of {name}"] = source.nbytes / graph_us(partial(_fetch, given), 2)
    return {name: rate * 1e6 for name, rate in found.items()}


def _fetch(given: Any, _turn: int) -> None:
    fetch(*given)


def access_us(subject: Subject) -> dict[str, float]:
    """Microseconds of an access to a cache of half of the units."""
    found = {}
    alive = torch.ones(1, dtype=torch.int64, device=DEVICE)
    for name in CACHED[:2]:
        units = subject.index.group(0, name).units
        for policy in ("lfu", "lru"):
            cache = make_cache(units, units // 2, policy, DEVICE)
            masks = [torch.rand(units, device=DEVICE) < 0.5 for _ in range(8)]
            places = {"first": 0, "past": cache.slots, "most": units}

            def run(i: int, cache: Any = cache, masks: Any = masks, places: Any = places) -> None:
                access(cache, masks[i % 8], alive, **places)

            for i in range(300):  # priorities as in the middle of a text
                run(i)
            found[f"{policy} of {units}"] = graph_us(run, 32)
    return found


def measure(subject: Subject, name: str, share: float, new: int, rounds: int) -> Row:
    """One method with caches of one size."""
    method = METHODS[name]
    memory = subject.limit(method, share)
    row = Row(name, share, memory)
    gc.collect()  # the model before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    model = subject.load(method, memory)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
    prompt = torch.randint(3, 1000, (1, PROMPT), device=DEVICE)

    def generate(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    try:
        generate(new + 1)  # kernels are compiled, the graph is captured, the caches fill
        for _ in range(rounds):
            alone = generate(1)
            dipnet.reset_stats(model)
            row.seconds.append((generate(new + 1) - alone) / new)
        stats = dipnet.stats(model)
        missed = {each: stats.sites[each].misses for each in CACHED[:2]}
        row.link_bytes = sum(subject.unit_bytes(each) * missed[each] for each in missed) / new
        hits = sum(stats.sites[each].hits for each in CACHED[:2])
        row.hit_rate = hits / (hits + sum(missed.values()))
        row.hbm_bytes = subject.touched(model)
        row.peak_memory = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return row


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    return (
        row.method,
        percent(row.share),
        f"{row.median * 1e3:.2f}",
        f"{1 / row.median:.1f}",
        "-" if row.hit_rate is None else percent(row.hit_rate),
        f"{row.link_bytes / 1e6:.0f}",
        percent(row.of_limit),
        f"{row.peak_memory / 2**30:.2f} of {row.memory_limit / 2**30:.2f} GiB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", choices=("int4", "int8", "bf16"), default="int4")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    subject = Subject(args.layers, args.weights, DEVICE)
    link, hbm = link_bandwidths(subject), read_bandwidth()
    torch.cuda.empty_cache()
    rates = {**link, "HBM": hbm}
    print("GB/s:", {name: round(rate / 1e9, 1) for name, rate in rates.items()}, flush=True)
    accesses = access_us(subject)
    print("us an access:", {name: round(took, 1) for name, took in accesses.items()}, flush=True)
    settings = [("dense", 0.0), *((name, share) for share in args.shares for name in METHODS)]
    rows = []
    for name, share in settings:
        row = measure(subject, name, share, args.tokens, args.rounds)
        row.limit_seconds = max(row.link_bytes / max(link.values()), row.hbm_bytes / hbm)
        rows.append(row)
        print(*cells(row), sep="  ", flush=True)
    print_table(COLUMNS, [cells(row) for row in rows])
    made = [{**asdict(row), "median": row.median, "of_limit": row.of_limit} for row in rows]
    shape = {"layers": args.layers, "weights": args.weights}
    figures = {"bytes_per_second": rates, "access_us": accesses, "rows": made}
    print(json_line({**shape, **figures}))


if __name__ == "__main__":
    main()
