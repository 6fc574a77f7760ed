"""Pack a checkpoint into a store."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dipnet import __version__
from dipnet.errors import InputError
from dipnet.methods.allocation import Allocation
from dipnet.pack.partial import Partial
from dipnet.pack.plan import Block, Plan, make_plan
from dipnet.pack.records import Packed, Slab, pack_slab, slabs
from dipnet.registry import unknown
from dipnet.store.geometry import UNITS, WEIGHTS, Unit, Weights
from dipnet.store.index import (
    ALLOCATION_NAME,
    INDEX_NAME,
    RECORDS_NAME,
    REST_NAME,
    Index,
    read_index,
)

SECONDS_KEPT = 3.0
"""A killed packing repeats about so much of its work."""
WORKERS = 2
Progress = Callable[[int, int], object]
Permutation = Mapping[int, Tensor]


def pack(
    source: str,
    out: str | Path,
    weights: Weights = "int4",
    block: Block = "auto",
    permutation: Permutation | None = None,
    progress: Progress | None = None,
    unit: Unit = "column",
    allocation: str | Path | Allocation | None = None,
) -> Index:
    """Pack ``source``, a folder, hub id or bundled model, into the new folder ``out``.

    ``weights`` is int4, int8 or bf16. ``block`` neighbouring MLP neurons become one record; "auto"
    chooses the fewest that make a record worth its read. ``permutation`` maps a layer to the new
    order of its neurons, a (neurons,) int64 tensor: neuron j of the store is ``order[j]`` of the
    checkpoint, which leaves the model's function as it is. ``progress`` is called with the bytes
    of records written so far and in all.

    ``unit`` says what the MLP's records hold: "column", columns of input channels, for methods that
    decide by channels (DIP); or "neuron", for those that choose neurons before their block (Deja
    Vu), a neuron's rows of gate and up and its column of down together.

    ``allocation``, what `dipnet fit allocation` wrote for this model, becomes a file of the store:
    it divides the density of methods that run from it and do not say how theirs is divided.

    Everything goes to ``out``.partial, which takes the name ``out`` when it is whole. A packing
    that was interrupted goes on where it was when it is called again with the same arguments.
    Memory stays at a few hundred megabytes for any model. Raises InputError when the checkpoint
    cannot be packed, the allocation is another model's, ``out`` exists, or the disk is full.
    """
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)
    if block != "auto" and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise InputError(f"block must be 'auto' or at least 1, got {block!r}")
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    divided = Allocation.given(allocation)
    plan = make_plan(source, weights, block, unit, _orders(permutation), divided)
    folder = Path(out).absolute()
    sizes = {RECORDS_NAME: plan.index.records_bytes, REST_NAME: plan.index.rest_bytes}
    with Partial(folder, _arguments(plan), sizes) as partial:
        _write_records(plan, partial, progress or (lambda done, total: None))
        index = _write_rest(plan, partial)
        for file in plan.checkpoint.side_files():
            partial.add(file.name, file.read_bytes())
        if divided is not None:
            partial.add(ALLOCATION_NAME, divided.text.encode())
        partial.add(INDEX_NAME, (index.model_dump_json(indent=1) + "\n").encode())
        partial.finish()
    return read_index(folder)


def _write_records(plan: Plan, partial: Partial, progress: Progress) -> None:
    groups = plan.index.groups
    kept = time.monotonic()
    remaining = islice(slabs(groups), partial.done, None)
    for done, packed in enumerate(_in_order(plan, remaining), partial.done + 1):
        group = groups[packed.slab.group]
        offset = group.offset_of(packed.slab.first)
        partial.write(RECORDS_NAME, offset, packed.records.data)
        if packed.scales is not None:
            begin = plan.rest.begin(group.scale_name) + 4 * packed.slab.first * group.columns
            partial.write(REST_NAME, begin, packed.scales.numpy().data)
        if time.monotonic() - kept > SECONDS_KEPT:
            partial.keep(done)
            kept = time.monotonic()
        progress(offset + packed.records.nbytes, plan.index.records_bytes)
    partial.keep(sum(1 for _ in slabs(groups)))


def _in_order(plan: Plan, work: Iterable[Slab]) -> Iterator[Packed]:
    """The packed slabs in order, while a few more are made."""
    running: deque[Future[Packed]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(WORKERS) as pool:
        try:
            for slab in work:
                running.append(pool.submit(pack_slab, plan, slab))
                if len(running) > WORKERS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Whole slabs are what runs in parallel: threads within each would only get in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_rest(plan: Plan, partial: Partial) -> Index:
    """Write the rest of the tensors; the index with the checksum of the whole file."""
    partial.write(REST_NAME, 0, plan.rest.header)
    for offset, data in plan.rest.pieces(plan.checkpoint, plan.orders):
        partial.write(REST_NAME, offset, data)
    digest = hashlib.sha256()
    for piece in partial.read(REST_NAME):
        digest.update(piece)
    return plan.index.model_copy(update={"rest_sha256": digest.hexdigest()})


def _orders(permutation: Permutation | None) -> dict[int, Tensor]:
    """The orders of the layers' neurons, as int64 on the CPU."""
    given = (permutation or {}).items()
    return {layer: torch.as_tensor(order).to("cpu", torch.int64) for layer, order in given}


def _arguments(plan: Plan) -> dict[str, Any]:
    """What two packings must agree in for one to go on with the other's work."""
    orders = hashlib.sha256()
    for layer, order in sorted(plan.orders.items()):
        orders.update(f"{layer}:".encode() + order.numpy().tobytes())
    return {
        "dipnet": __version__,
        "checkpoint": plan.checkpoint.fingerprint(),
        "weights": plan.index.weights,
        "unit": plan.index.unit,
        "block": plan.index.neurons.block,
        "permutation": orders.hexdigest(),
        "allocation": plan.index.allocation_sha256,
    }
