"""``dipnet probe``: measure this machine, for simulations of what would run on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.console import json_text, out, quiet_libraries, stream, titled_table
from dipnet.cli.options import Json
from dipnet.cli.progress import progress_bar
from dipnet.files import check_writable, write_file

if TYPE_CHECKING:
    from dipnet.eval.probe import Progress
    from dipnet.sim.device import Device


def probe(
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the device here, for --device FILE",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Whose disk is measured; 512 MiB must be free")
    ] = Path("."),
    json: Json = False,
) -> None:
    """Measure this machine in under a minute: its disk, its memory, what our engine costs on it.

    Other programs and virtual machines that compute or read meanwhile are measured too; it says so
    when they took much of the processors' time.

    Example: dipnet probe --out here.json
    """
    if file is not None:
        check_writable(file)
    quiet_libraries()
    from dipnet.eval.probe import probe as measure

    with probe_progress() as progress:
        device = measure(folder, file.stem if file and file.stem else "probed", progress)
    text = json_text(device.model_dump(mode="json"))
    if file is not None:
        write_file(file, text)
    if json:
        stream(text)
    else:
        _show(device)
        if file is not None:
            out.print(f"written to {file}: dipnet simulate MODEL --device {file}", soft_wrap=True)


@contextmanager
def probe_progress() -> Iterator[Progress]:
    """A bar on a terminal for what `dipnet.eval.probe.probe` says of its progress."""
    from rich.progress import TimeElapsedColumn

    with progress_bar(TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _show(device: Device) -> None:
    """Print the disk's curve, the engine's costs, and how they were measured."""
    curve = device.flash.curve
    depths = sorted({point.depth for point in curve})
    known = {(point.read_bytes, point.depth): point.bandwidth for point in curve}
    table = titled_table(
        "Disk: MB/s of reads asked for at once", ["bytes of a read"], [f"{d}" for d in depths]
    )
    for size in sorted({point.read_bytes for point in curve}):
        table.add_row(f"{size:,}", *(f"{known[size, depth] / 1e6:,.1f}" for depth in depths))
    out.print(table)
    out.print(f"memory: {device.dram.bandwidth / 1e9:.1f} GB/s")
    if device.engine is not None:
        products = {kind: points[-1] for kind, points in device.engine.products.items()}
        speeds = ", ".join(f"{kind} {p.bandwidth / 1e9:.1f} GB/s" for kind, p in products.items())
        out.print(f"products: {speeds}, and {_nanoseconds(products)} ns a column")
        layer = device.engine.layer * 1e3
        out.print(f"a layer besides: {layer:.2f} ms; a token: {device.engine.token * 1e3:.2f} ms")
    out.print(device.description, soft_wrap=True)


def _nanoseconds(products: dict) -> str:
    return ", ".join(f"{point.column * 1e9:.0f}" for point in products.values())
