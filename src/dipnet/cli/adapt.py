"""``dipnet adapt``: adapters that win back what a method's masks cost, merged into a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import note, out, print_json, quiet_libraries, titled_table
from dipnet.cli.inputs import check_window, load, tokens_of
from dipnet.cli.methods import parse_method
from dipnet.cli.options import (
    DENSITY_HELP,
    FLAG,
    METHOD_HELP,
    Checkpoint,
    Device,
    Dtype,
    Json,
    Rate,
    Seed,
    TextToFit,
    Window,
)
from dipnet.cli.progress import step_progress

if TYPE_CHECKING:
    from dipnet.adapt.adapters import Adapters
    from dipnet.eval.texts import TokenText
    from dipnet.methods.base import Method
    from dipnet.models.load import LoadedModel

SCHEMA = "dipnet.adapt/1"
LOSS_DIGITS = 4


class PrecisionOption(StrEnum):
    """What the forward pass computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def adapt(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write")],
    text: TextToFit,
    model: Checkpoint = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "dip",
    density: Annotated[
        float | None, typer.Option(help=f"{DENSITY_HELP}; default: 0.5", show_default=False)
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Learn to live with a cache of that share of each site's units: for "
            "dip:cache_aware=0.2",
            show_default=False,
        ),
    ] = None,
    cache_policy: Annotated[
        str, typer.Option("--cache-policy", "--policy", help="What it evicts: lru or lfu")
    ] = "lru",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step")] = 16,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts that a step's windows are computed in: saves memory")
    ] = 1,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", metavar=FLAG, help="Compute activations twice: saves more memory"
        ),
    ] = False,
    rate: Rate = 1e-3,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the dense model")] = 1.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text's own loss")] = 0.0,
    hidden: Annotated[
        float, typer.Option(help="Weight of the layers' distance from the dense model's")
    ] = 0.0,
    precision: Annotated[
        PrecisionOption, typer.Option(help="Of the forward pass; auto: bfloat16 on a GPU")
    ] = PrecisionOption.AUTO,
    window: Window = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Train LoRA adapters under a method's masks to do what the dense model does.

    DIR gets adapter/ (PEFT's format), merged/ (a checkpoint that pack, eval and run take like any,
    at no byte more a token) and adapters.json. Repeated after an interruption, the command goes on
    where it stopped. On several GPUs: accelerate launch -m dipnet adapt ...

    Example: dipnet adapt --method dip --density 0.5 --text books.txt --out adapted

    Example: dipnet adapt Qwen/Qwen3-0.6B --method dip:cache_aware=0.2 --cache 0.5 --text books.txt
    --out adapted
    """
    from dipnet.cache import CacheSettings

    request = parse_method(method)
    wanted = density if density is not None or not request.takes_density else 0.5
    built = request.build(wanted)
    settings: dict[str, Any] = {
        "cache": None if cache is None else CacheSettings(cache, cache_policy),
        "rank": rank,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "checkpointing": checkpointing,
        "rate": rate,
        "kl": kl,
        "cross_entropy": cross_entropy,
        "hidden": hidden,
        "precision": precision.value,
        "seed": seed,
    }
    quiet_libraries()
    from dipnet.adapt.adapter_settings import AdapterSettings
    from dipnet.adapt.lora import check_peft
    from dipnet.eval.texts import read_text

    AdapterSettings(**settings)
    check_peft()
    content = read_text(text)
    loaded = load(model, _own_device(device), dtype)
    used = tokens_of(loaded, content)
    size = check_window(loaded, window)
    ready = _ready(loaded, built, used, size)
    made = _fit(loaded, ready, used, size, folder, settings)
    if json:
        print_json({"schema": SCHEMA, "model": loaded.name, "out": str(folder), **made.card})
    elif _first_process():
        _show(made)


def _own_device(device: str) -> str:
    """This process's GPU, where several were launched together."""
    from dipnet.adapt.processes import processes

    if device in ("auto", "cuda") and processes().num_processes > 1:
        return str(processes().device)
    return device


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _ready(loaded: LoadedModel, method: Method, used: TokenText, window: int) -> Method:
    """The method, calibrated on the text where it has to be."""
    from dipnet.adapt.ready import CALIBRATION_TOKENS, Fitter
    from dipnet.eval.texts import bos_token

    tokens = used.first(CALIBRATION_TOKENS).tokens
    return Fitter(loaded.model, window, calibration=tokens, bos=bos_token(loaded.tokenizer))(method)


def _fit(
    loaded: LoadedModel,
    method: Method,
    used: TokenText,
    window: int,
    folder: Path,
    settings: dict[str, Any],
) -> Adapters:
    import dipnet
    from dipnet.eval.texts import bos_token

    try:
        with _progress() as progress:
            return dipnet.fit_adapters(
                loaded.model,
                method,
                used.tokens,
                out=folder,
                window=window,
                bos=bos_token(loaded.tokenizer),
                tokenizer=loaded.tokenizer,
                text=used.as_json(),
                progress=progress,
                **settings,
            )
    except KeyboardInterrupt:
        note(f"repeat the command to go on from the state in {folder}")
        raise


@contextmanager
def _progress() -> Iterator[Callable[[int, int, float | None, float], None]]:
    """A bar in steps, with the loss and the held-out perplexity."""
    with step_progress("adapting", shown=_first_process()) as moved:

        def update(done: int, planned: int, loss: float | None, perplexity: float) -> None:
            found = "" if loss is None else f", loss {loss:.{LOSS_DIGITS}f}"
            moved(done, planned, f"{found}, held-out perplexity {perplexity:.2f}")

        yield update


def _show(made: Adapters) -> None:
    """Print what was won back, and where it is."""
    found, card = made.perplexity, made.card
    table = titled_table("perplexity of held-out text", [""], ["perplexity", "of the gap"])
    gap = found["masked"] - found["dense"]
    for label, name in (("dense", "dense"), ("masked", "masked"), ("adapted", "adapted")):
        closed = f"{(found['masked'] - found[name]) / gap:.0%}" if gap > 0 else ""
        table.add_row(label, f"{found[name]:.2f}", closed)
    out.print(table)
    seconds, tokens = card["seconds"]["training"], card["tokens"]["trained"]
    out.print(
        f"{made.merged} and {made.adapter}: trained on {tokens:,} tokens in {seconds:,.0f} s",
        markup=False,
        soft_wrap=True,
    )
