"""``dipnet check``: whether a store is what was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipnet.cli.console import out, print_json
from dipnet.cli.options import Json
from dipnet.cli.pack import show_groups, summary
from dipnet.cli.progress import byte_progress

SCHEMA = "dipnet.check/1"


def check(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that pack made")],
    json: Json = False,
) -> None:
    """Read a store from end to end and compare every record with its checksum.

    Example: dipnet check qwen3.dipnet
    """
    from dipnet.store.check import check_store, records

    with byte_progress(f"checking {store}") as progress:
        index = check_store(store, progress)
    if json:
        about = {"schema": SCHEMA, "store": str(store), "intact": True, "records": records(index)}
        print_json({**about, **summary(index)})
    else:
        show_groups(index)
        out.print(f"{records(index):,} records are intact")
