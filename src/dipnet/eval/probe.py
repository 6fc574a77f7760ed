"""`dipnet probe`: measure this machine and its disk, and describe it as a device.

The disk and the engine's steps are measured alone, what Python and the model's other layers take on
random decoders of two sizes that generate text as `dipnet run` does.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dipnet import __version__
from dipnet.errors import InputError
from dipnet.eval.generate import generate
from dipnet.methods.dip import DIP
from dipnet.models.load import DEFAULT_MODEL, LoadedModel, empty_model, load_config, load_tokenizer
from dipnet.models.recording import model_shape
from dipnet.pack.packing import pack
from dipnet.sim.device import Device, EngineCosts, Point, Tier
from dipnet.sim.groups import held_group, pinned_groups
from dipnet.sim.shape import ModelShape
from dipnet.sim.walk import Walk
from dipnet.store.index import read_index
from dipnet.streaming.attach import streamed
from dipnet.streaming.budget import CACHED
from dipnet.streaming.engine import default_threads
from dipnet.streaming.load import load
from dipnet.streaming.probe_disk import probe_disk
from dipnet.streaming.probe_reads import ReadCosts, probe_reads
from dipnet.streaming.probe_records import Costs, fitted, probe_records, write_regions

SCRATCH_BYTES = 256 << 20
PIECE = 4 << 20
DISK_SECONDS = 10.0
DRAM_BYTES = 512 << 20
TRIES = 5
"""Of each text that is generated, and of passes over memory."""

Progress = Callable[[str, float], object]
"""Called with what is being measured, and the share of all work that is done."""


@dataclass(frozen=True)
class Sample:
    """A random decoder and a text to measure: one of them differs in one thing from another."""

    width: int
    neurons: int
    layers: int
    vocabulary: int
    prompt: int


SAMPLES = (
    Sample(256, 1024, 2, 8192, 16),
    Sample(256, 1024, 8, 8192, 16),
    Sample(1024, 4096, 2, 8192, 16),
    Sample(256, 1024, 2, 65536, 16),
    Sample(256, 1024, 8, 8192, 512),
)
"""The differences: layers, width, vocabulary, tokens that attention reads."""
NEW_TOKENS = 24
KEPT = 0.5
HEAD_SIZE = 64


def probe(folder: Path, name: str, progress: Progress) -> Device:
    """This machine with the disk of ``folder`` as a device; in under a minute on most.

    A scratch file of 256 MiB and some small stores are made in the folder and removed, whatever
    happens. Raises InputError when the folder cannot be written or the disk has no room.
    """
    with _scratch(folder) as scratch:
        progress("writing the scratch file", 0.0)
        file = scratch / "records"
        _write(file)
        curve = probe_disk(file, DISK_SECONDS, lambda s: progress("disk", 0.05 + 0.25 * s))
        costs = _records(file, progress)
        reading = probe_reads(file)
        progress("memory", 0.5)
        bandwidth = _dram_bandwidth()
        engine = _engine(scratch, reading, costs, progress)
    return Device(
        name=name,
        description=_description(folder),
        dram=Tier(capacity=_memory(), bandwidth=bandwidth, latency=0.0),
        flash=Tier(
            capacity=shutil.disk_usage(folder).total,
            bandwidth=max(point.bandwidth for point in curve),
            latency=_latency(curve),
            curve=curve,
        ),
        overlap=True,
        engine=engine,
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; what is wrong with the disk is said in one line."""
    try:
        with tempfile.TemporaryDirectory(prefix=".dipnet-probe-", dir=folder) as made:
            if shutil.disk_usage(folder).free < 2 * SCRATCH_BYTES:
                raise InputError(
                    f"the disk of {folder} has less than {2 * SCRATCH_BYTES >> 20} MiB left: free "
                    "some, or give another --folder"
                )
            yield Path(made)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot measure the disk of {folder}: {reason}; give a folder that can be written"
        ) from None


def _write(file: Path) -> None:
    """Records, then random bytes: some disks shorten zeros."""
    rng = np.random.default_rng(0)
    with file.open("wb") as opened:
        write_regions(opened, rng)
        while (left := SCRATCH_BYTES - opened.tell()) > 0:
            opened.write(rng.bytes(min(PIECE, left)))
        opened.flush()
        os.fsync(opened.fileno())


def _records(file: Path, progress: Progress) -> Costs:
    steps = list(range(7))
    for step, costs in zip(steps, probe_records(file), strict=False):
        progress("kernels", 0.3 + 0.2 * step / len(steps))
        if costs is not None:
            return costs
    raise AssertionError("probe_records ends with its costs")


def _dram_bandwidth() -> float:
    """Bytes/s of adding up what no processor cache holds, with all threads."""
    values = torch.ones(DRAM_BYTES // 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    took = []
    try:
        for _ in range(TRIES):
            start = time.perf_counter()
            values.sum()
            took.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return DRAM_BYTES / statistics.median(took)


@dataclass(frozen=True)
class _Timed:
    """Seconds of a sample's token and of its masks alone, in memory, of masks when streaming."""

    sample: Sample
    shape: ModelShape
    token: float
    masks: float
    streaming: float
    units: int


def _engine(scratch: Path, reading: ReadCosts, costs: Costs, progress: Progress) -> EngineCosts:
    """All costs: what the samples take beyond the known steps goes to the others."""
    timed = []
    for number, sample in enumerate(SAMPLES):
        progress("decoding", 0.5 + 0.5 * number / len(SAMPLES))
        timed.append(_timed(scratch / str(number), sample))
    selection, unit = fitted(
        [(2 * t.sample.layers, t.units) for t in timed], [t.masks for t in timed]
    )
    more = [(t.streaming - t.masks) / (2 * t.sample.layers) for t in timed]
    known = EngineCosts(
        token=0,
        logit=0,
        layer=0,
        number=0,
        key=0,
        call=costs.call,
        channel=costs.channel,
        row=costs.row,
        selection=selection,
        unit=unit,
        exchange=max(0.0, statistics.median(more)),
        **asdict(reading),
        products=costs.products,
    )
    rest = fitted(
        [_terms(t) for t in timed], [max(t.token - _walked(known, t), 1e-9) for t in timed]
    )
    names = ("token", "layer", "number", "logit", "key")
    return known.model_copy(update=dict(zip(names, rest, strict=True)))


def _terms(timed: _Timed) -> tuple[float, ...]:
    """How often a token pays for itself, a layer, a number, a logit and a key."""
    s = timed.sample
    past = s.prompt + NEW_TOKENS / 2
    keys = s.layers * timed.shape.kv_width * past
    return 1.0, s.layers, s.layers * (s.width + s.neurons), s.vocabulary, keys


def _timed(folder: Path, sample: Sample) -> _Timed:
    """Make a sample, pack it and let it generate text."""
    store = folder / "store"
    pack(str(_checkpoint(folder / "model", sample)), store, "int4")
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    method = DIP(input_density=KEPT, hidden_density=KEPT)
    held = load(store, method, context=sample.prompt + NEW_TOKENS)
    loaded = LoadedModel("probe", held, tokenizer, "int4")
    prompt = torch.arange(3, 3 + sample.prompt)[None]
    took: list[float] = []
    with _masks(held) as masks:
        for _ in range(TRIES):
            took += generate(loaded, prompt, max_new_tokens=NEW_TOKENS).token_seconds
    streaming = _streaming(store, method)
    units = sample.layers * (sample.width + sample.neurons)
    shape = model_shape(empty_model(load_config(str(store))))
    return _Timed(
        sample, shape, statistics.median(took), statistics.median(masks), streaming, units
    )


def _checkpoint(folder: Path, sample: Sample) -> Path:
    """A random decoder, whose text never ends by itself."""
    config = LlamaConfig(
        hidden_size=sample.width,
        intermediate_size=sample.neurons,
        num_hidden_layers=sample.layers,
        num_attention_heads=sample.width // HEAD_SIZE,
        num_key_value_heads=sample.width // HEAD_SIZE // 2,
        head_dim=HEAD_SIZE,
        vocab_size=sample.vocabulary,
        max_position_embeddings=2 * (max(s.prompt for s in SAMPLES) + NEW_TOKENS),
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@contextmanager
def _masks(model: PreTrainedModel) -> Iterator[list[float]]:
    """The seconds that each call inside the block takes for its masks."""
    spent = streamed(model).seconds
    took: list[float] = []

    def begin(*_: Any) -> None:
        took.append(-spent.selection)

    def end(*_: Any) -> None:
        took[-1] += spent.selection

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield took
    finally:
        for hook in hooks:
            hook.remove()


def _streaming(store: Path, method: DIP) -> float:
    """Seconds that a token's masks take when half of the records have a place in the caches."""
    index = read_index(store)
    streamed_bytes = sum(group.bytes for group in index.groups if group.name in CACHED)
    model = load(store, method, cache=streamed_bytes // 2, look_ahead=False)
    loaded = LoadedModel("probe", model, load_tokenizer(DEFAULT_MODEL), "int4")
    with _masks(model) as masks:
        generate(loaded, torch.arange(3, 19)[None], max_new_tokens=NEW_TOKENS)
    return statistics.median(masks[1:])  # the first is the prompt, which has none


def _walked(costs: EngineCosts, timed: _Timed) -> float:
    """Seconds of a sample's token by the costs that are known so far."""
    sample = timed.sample
    like = np.zeros(1)
    groups = {(g.layer, g.name): g for g in pinned_groups(timed.shape, "int4", like)}
    for layer in range(sample.layers):
        for name, channels, rows in (
            ("mlp.in", sample.width, 2 * sample.neurons),
            ("mlp.hidden", sample.neurons, sample.width),
        ):
            groups[layer, name] = held_group(layer, name, channels, rows, "int4", KEPT, like)
    walk = Walk(Tier(capacity=1, bandwidth=1, latency=0), costs, timed.shape, "int4", groups, like)
    return float(walk.token(None)[0])


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _latency(curve: Sequence[Point]) -> float:
    """Seconds of the smallest read alone."""
    return min(point.read_bytes * point.depth / point.bandwidth for point in curve)


def _description(folder: Path) -> str:
    """What was measured, for people."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return (
        f"measured by dipnet {__version__} on {when} UTC: {default_threads()} threads of "
        f"{platform.processor() or platform.machine()}, the disk of {folder}"
    )
