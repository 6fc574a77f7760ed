"""Stores that are made on the way: a checkpoint is packed once into a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from dipnet.errors import InputError
from dipnet.files import make_folder
from dipnet.models.load import DEMO_MODELS
from dipnet.pack.checkpoint import Checkpoint
from dipnet.pack.packing import pack
from dipnet.pack.plan import Block
from dipnet.registry import unknown
from dipnet.store.geometry import WEIGHTS, Unit, Weights
from dipnet.store.index import INDEX_NAME, RECORDS_NAME, VERSIONS, Index, read_index

Progress = Callable[[int, int], object]


def is_store(name: str | Path) -> bool:
    """Whether a name is the folder of a store, finished or not."""
    return any((Path(name) / file).is_file() for file in (INDEX_NAME, RECORDS_NAME))


def cache_folder() -> Path:
    """Where packed models go: $DIPNET_CACHE, else ~/.cache/dipnet (or $XDG_CACHE_HOME/dipnet)."""
    if own := os.environ.get("DIPNET_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "dipnet"


def packed(
    name: str,
    weights: Weights,
    progress: Progress | None = None,
    block: Block = "auto",
    unit: Unit = "column",
) -> Path:
    """The store of the checkpoint ``name`` in the cache folder; packed there when it is not yet.

    A local checkpoint is packed anew when its files change; one of the hub keeps its store until
    that is removed. ``progress`` is as in `pack`. Raises InputError as `pack` does.
    """
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)
    usual = cache_folder() / _folder_name(name, weights, unit)
    if block == "auto" or (usual.exists() and block_of(read_index(usual)) == block):
        folder = usual
    else:
        folder = usual.with_name(f"{usual.name}-b{block}")
    if not folder.exists():
        made = make_folder(folder.parent) / folder.name
        pack(name, made, weights, block, progress=progress, unit=unit)
    return folder


def block_of(index: Index) -> int:
    """The neurons of a record."""
    return index.neurons.block


def store_of(
    name: str | Path,
    weights: Weights | None,
    progress: Progress | None = None,
    block: Block = "auto",
    unit: Unit = "column",
) -> Path:
    """The store that a model runs from: ``name`` itself, or the packed form of a checkpoint.

    Raises InputError when ``name`` is no store and ``weights`` does not say how to pack it, or a
    store holds its weights in another form.
    """
    if not is_store(name):
        # What is no store and shall not be packed is the index's to explain.
        if weights is None:
            return Path(name)
        return packed(str(name), weights, progress, block, unit)
    if weights is not None and read_index(name).weights != weights:
        raise InputError(
            f"the store {str(name)!r} holds its weights as {read_index(name).weights}: ask for "
            f"that, or pack the model again as {weights}"
        )
    return Path(name)


def _folder_name(name: str, weights: Weights, unit: Unit) -> str:
    """What a packed model is called in the cache: like the hub's folders, for people to read."""
    if (
        name not in DEMO_MODELS
        and not Path(name).exists()
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    ):
        return f"models--{name.replace('/', '--')}--{weights}-v{VERSIONS[unit]}"
    checkpoint = Checkpoint(name)
    known = json.dumps([str(checkpoint.folder.resolve()), checkpoint.fingerprint()])
    digest = hashlib.sha256(known.encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "-", checkpoint.folder.resolve().name)
    label = name if name in DEMO_MODELS else f"folder--{readable}"
    return f"{label}--{digest}--{weights}-v{VERSIONS[unit]}"
