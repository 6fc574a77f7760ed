"""``dipnet info``: what a model is made of, and what a token reads at a density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dipnet.cli.console import note, out, print_json, quiet_libraries, titled_table
from dipnet.cli.methods import MethodRequest, unique
from dipnet.cli.options import Densities, Json, Model
from dipnet.cli.pack import show_groups, summary
from dipnet.errors import InputError
from dipnet.units import ATTENTION_MATRICES, MLP_MATRICES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from dipnet.units import ModelSpec

SCHEMA = "dipnet.info/1"
STORE_SCHEMA = "dipnet.store-info/1"
DENSITIES = (1.0, 0.8, 0.5, 0.3)


def info(model: Model = None, density: Densities = None, json: Json = False) -> None:
    """Show a model's shapes, sites and units, and the bytes that a token reads.

    Reads the config alone: no weights are loaded. Of a store that `dipnet pack` made it shows the
    records, and the smallest memory that it runs in.

    Example: dipnet info meta-llama/Llama-3.1-8B --density 0.5
    """
    if _is_store(model):
        if density:
            raise InputError("--density has no effect on a store: leave it out")
        return _store_info(str(model), json)
    described = _describe(model, unique(density or DENSITIES))
    if json:
        print_json(described)
    else:
        _print(described)


def _is_store(name: str | None) -> bool:
    quiet_libraries()
    from dipnet.streaming.packed import is_store

    return name is not None and is_store(name)


def _store_info(name: str, json: bool) -> None:
    """Show what a store holds, and what it needs."""
    from dipnet.models.load import load_tokenizer
    from dipnet.store.index import read_index
    from dipnet.streaming.budget import cached_names, size_text
    from dipnet.streaming.load import DEFAULT_CONTEXT, measured_needs

    index = read_index(name)
    load_tokenizer(name)  # a part of what a process holds that runs the model
    context = min(index.context, DEFAULT_CONTEXT)
    smallest = measured_needs(name, context).smallest
    names = cached_names(index)
    streamed = sum(group.bytes for group in index.groups if group.name in names)
    if json:
        needs = {"context_of_smallest": context, "smallest_memory": smallest}
        about = {"schema": STORE_SCHEMA, "store": name, "context": index.context}
        return print_json({**about, **summary(index), "streamed_bytes": streamed, **needs})
    show_groups(index)
    out.print(
        f"The records of {' and '.join(names)}, {size_text(streamed)}, may stay on disk. For "
        f"{context:,} tokens the smallest that works is --memory {smallest >> 20}MiB; a shorter "
        "text needs less.",
        markup=False,
        soft_wrap=True,
    )


def _describe(name: str | None, densities: list[float]) -> dict[str, Any]:
    """Everything that is shown, ready for JSON."""
    quiet_libraries()
    import torch

    from dipnet.models.families import describe
    from dipnet.models.load import DEFAULT_MODEL, empty_model, load_config

    config = load_config(name or DEFAULT_MODEL)
    empty = empty_model(config)
    spec = describe(empty)
    dtype = config.get_text_config().dtype or torch.float32
    if quantised := _quantised(config):
        note(f"the checkpoint is quantised ({quantised}): bytes are as if in {_name(dtype)}")
    return {
        "schema": SCHEMA,
        "model": name or DEFAULT_MODEL,
        "family": spec.family,
        "layers": spec.layers,
        "activation": spec.activation,
        "context": config.get_text_config().max_position_embeddings,
        "dtype": _name(dtype),
        "parameters": empty.num_parameters(),
        "matrices": {name: list(shape) for name, shape in spec.matrices.items()},
        "sites": _sites(spec),
        "weights_per_token": {
            "mlp": spec.layers * spec.mlp_weights,
            "attention": spec.layers * spec.attention_weights,
            "head_and_rest": spec.other_weights,
            "total": spec.weights_per_token,
        },
        "bytes_per_token": [_bytes(spec, density, dtype.itemsize) for density in densities],
        "methods": _methods(spec),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantised(config: PretrainedConfig) -> str | None:
    """How a checkpoint is quantised, or None."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    kind = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(kind or "in an unknown way")


def _sites(spec: ModelSpec) -> list[dict[str, Any]]:
    """Where DIP decides masks in one layer."""
    from dipnet.methods.dip import DIP

    sites = [s for s in DIP(1.0, attention_density=1.0).sites(spec) if s.layer == 0]
    return [
        {
            "site": site.name,
            "units": site.units,
            "matrices": [operand.matrix for operand in site.operands],
            "weights_per_unit": site.weights_per_unit,
        }
        for site in sites
    ]


def _bytes(spec: ModelSpec, density: float, size: int) -> dict[str, Any]:
    """What a token reads with DIP at a density, its top-k rounded as in a run."""
    from dipnet.methods.dip import DIP
    from dipnet.units import kept_units

    dropped = sum(
        (site.units - kept_units(site.density, site.units)) * site.weights_per_unit
        for site in DIP(density).sites(spec)
    )
    read = spec.weights_per_token - dropped
    return {"density": density, "bytes": read * size, "share": read / spec.weights_per_token}


def _methods(spec: ModelSpec) -> list[dict[str, Any]]:
    """Every method: whether it works on this family, and whether it is fitted on text."""
    from dipnet.registry import METHODS, method_class

    listed = []
    for name in METHODS:
        request = MethodRequest(name, name, {})
        method = request.build(1.0 if request.takes_density else None)
        works = spec.gated or not method_class(name).needs_gate
        listed.append({"name": name, "works": works, "calibration": method.needs_calibration})
    return listed


def _print(described: dict[str, Any]) -> None:
    out.print(
        f"[bold]{escape(described['model'])}[/]: {described['family']}, {described['layers']} "
        f"layers, {described['activation']}, context {described['context']}, "
        f"{described['parameters'] / 1e6:,.1f} M parameters, {described['dtype']}"
    )
    for made in (_parts_table(described), _sites_table(described), _bytes_table(described)):
        out.print()
        out.print(made)
    works = [method for method in described["methods"] if method["works"]]
    out.print("\n[bold]Methods[/] " + ", ".join(_method_name(method) for method in works))
    out.print("[dim]* is fitted on a text: --calibration[/]")
    lacking = [method["name"] for method in described["methods"] if not method["works"]]
    if lacking:
        out.print(f"[dim]not on this family, which has no gate: {', '.join(lacking)}[/]")


def _parts_table(described: dict[str, Any]) -> Table:
    weights = described["weights_per_token"]
    shapes = {name: f"{name} {r}×{c}" for name, (r, c) in described["matrices"].items()}
    held = {"mlp": MLP_MATRICES, "attention": ATTENTION_MATRICES}
    made = titled_table(
        "Weights that a token reads", ["part", "matrices of a layer"], ["weights", "share"]
    )
    for part, count in weights.items():
        matrices = [shapes[name] for name in held.get(part, ()) if name in shapes]
        share = f"{count / weights['total']:.1%}"
        made.add_row(part.replace("_", " "), ", ".join(matrices), f"{count:,}", share)
    return made


def _sites_table(described: dict[str, Any]) -> Table:
    made = titled_table("Sites of DIP in a layer", ["site", "thins"], ["units", "weights of one"])
    for site in described["sites"]:
        thins = ", ".join(site["matrices"])
        made.add_row(site["site"], thins, f"{site['units']:,}", f"{site['weights_per_unit']:,}")
    return made


def _bytes_table(described: dict[str, Any]) -> Table:
    made = titled_table(
        f"A token reads with DIP, in {described['dtype']}",
        [],
        ["MLP density", "megabytes", "share of the dense model's"],
    )
    for row in described["bytes_per_token"]:
        made.add_row(f"{row['density']:g}", f"{row['bytes'] / 1e6:,.1f}", f"{row['share']:.1%}")
    return made


def _method_name(method: dict[str, Any]) -> str:
    return method["name"] + ("*" if method["calibration"] else "")
