"""``dipnet pack``: a store of a model, from which it can run in less memory than it has weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import err, note, out, print_json, quiet_libraries, titled_table
from dipnet.cli.options import Json
from dipnet.cli.progress import byte_progress
from dipnet.cli.streamed import Kind, Records
from dipnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.methods.allocation import Allocation
    from dipnet.pack.plan import Block
    from dipnet.store.geometry import Weights
    from dipnet.store.index import Index

SCHEMA = "dipnet.pack/1"


def pack(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or a bundled model")
    ],
    store: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make")],
    weights: Annotated[Kind, typer.Option(help="Bits of a weight")] = Kind.INT4,
    block: Annotated[
        str,
        typer.Option(metavar="N|auto", help="MLP neurons of a record; auto: as few as reads want"),
    ] = "auto",
    unit: Annotated[
        Records,
        typer.Option(
            help="What a record of the MLP holds: columns of input channels (dip, glu, teal), or "
            "a neuron whole (dejavu)"
        ),
    ] = Records.COLUMN,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text on which neurons that fire together are found and made neighbours; loads "
            "the dense model into memory",
            show_default=False,
        ),
    ] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Put what dipnet fit allocation wrote into the store: it divides the density of "
            "methods that run from it and do not say how",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Pack a model into a store, the format that runs from disk.

    Works in a few hundred megabytes of memory for any model. An interrupted packing goes on where
    it was when the same command is given again.

    Example: dipnet pack Qwen/Qwen3-0.6B qwen3.dipnet --weights int4
    """
    size = _block(block)
    quiet_libraries()
    from dipnet.methods.allocation import Allocation
    from dipnet.pack.packing import pack as pack_store

    divided = Allocation.given(allocation)
    permutation = None
    if calibration is not None:
        permutation = _fit(model, calibration, weights.value, size, unit, divided)
    began = time.monotonic()
    try:
        with byte_progress(f"packing {model}") as progress:
            index = pack_store(
                model, store, weights.value, size, permutation, progress, unit.value, divided
            )
    except KeyboardInterrupt:
        note("what is done is kept: the same command goes on from there")
        raise
    seconds = time.monotonic() - began
    if json:
        print_json(_described(index, store, seconds))
    else:
        show_groups(index)
        total = (index.records_bytes + index.rest_bytes) / 1e9
        out.print(f"{store}: {total:,.2f} GB in {seconds:,.0f} s", markup=False, soft_wrap=True)


def _block(value: str) -> Block:
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--block must be auto or a number from 1 on, got {value!r}")
    return int(value)


def _fit(
    model: str,
    file: Path,
    weights: Weights,
    block: Block,
    unit: Records,
    divided: Allocation | None,
) -> dict[int, Tensor]:
    """The order of every layer's neurons, found on a text in the dense model."""
    from dipnet.adapt.coactivation import fit_orders
    from dipnet.cli.inputs import load, tokens_of
    from dipnet.eval.texts import bos_token, read_text
    from dipnet.models.families import describe
    from dipnet.models.load import empty_model, load_config
    from dipnet.pack.plan import chosen_block

    spec = describe(empty_model(load_config(model)))
    if divided is not None:
        divided.check_model(spec)
    outputs, neurons = spec.matrices["down"]
    size = 1 if unit is Records.NEURON else chosen_block(weights, block, outputs, neurons)
    if size == 1:
        raise InputError(
            "--calibration has no effect on records of one neuron: leave it out, or give --block 4 "
            "and --unit column"
        )
    text = read_text(file)
    note("the dense model is loaded into memory to see which neurons fire together")
    loaded = load(model, "auto", "auto")
    with err.status("calibrating"):
        tokens = tokens_of(loaded, text).tokens
        return fit_orders(loaded.model, tokens, size, bos=bos_token(loaded.tokenizer))


def _described(index: Index, store: Path, seconds: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "store": str(store),
        "seconds": seconds,
        "bytes": index.records_bytes + index.rest_bytes,
        **summary(index),
    }


def summary(index: Index) -> dict[str, Any]:
    """What ``pack`` and ``check`` say about a store in JSON."""
    return {
        "source": index.source,
        "family": index.family,
        "weights": index.weights,
        "unit": index.unit,
        "layers": index.layers,
        "neurons_permuted": index.neurons_permuted,
        "allocation_sha256": index.allocation_sha256,
        "records_bytes": index.records_bytes,
        "rest_bytes": index.rest_bytes,
        "groups": group_rows(index),
    }


def group_rows(index: Index) -> list[dict[str, Any]]:
    """The kinds of groups: those of a layer are alike in every layer."""
    return [
        {
            "group": group.name,
            "matrices": list(group.matrices),
            "units": group.units,
            "block": group.block,
            "columns": group.columns,
            "record_bytes": group.record_bytes,
            "bytes": group.bytes * (1 if group.layer is None else index.layers),
        }
        for group in (*index.first_layer, index.groups[-1])
    ]


def show_groups(index: Index) -> None:
    """Print the table of a store's groups."""
    made = titled_table(
        f"{index.source} in {index.weights}, {index.layers} layers",
        ["group", "matrices"],
        ["units of a layer", "columns of one", "bytes of one", "total MB"],
    )
    for row in group_rows(index):
        made.add_row(
            row["group"],
            ", ".join(row["matrices"]),
            f"{row['units']:,}",
            str(row["columns"]),
            f"{row['record_bytes']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
        )
    made.add_row("everything else", "", "", "", "", f"{index.rest_bytes / 1e6:,.1f}")
    out.print(made)
    if index.allocation_sha256 is not None:
        out.print("The store's own allocation divides densities where a method does not say how.")
