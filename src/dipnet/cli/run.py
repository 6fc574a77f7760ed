"""``dipnet run``: generate text with a sparsified model."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import err, note, print_json, quiet_libraries, stream
from dipnet.cli.inputs import calibration_text, calibration_tokens, check_window, load
from dipnet.cli.methods import MethodRequest, parse_method
from dipnet.cli.options import (
    DENSITY_HELP,
    FLAG,
    METHOD_HELP,
    Calibration,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
)
from dipnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.eval.generate import Generation, Sampling
    from dipnet.eval.texts import Text
    from dipnet.methods.base import Method
    from dipnet.models.load import LoadedModel
    from dipnet.models.usage import Density

SCHEMA = "dipnet.run/1"
DEFAULT_DENSITY = 0.5


class Prefill(StrEnum):
    """How the prompt is processed."""

    DENSE = "dense"
    SPARSE = "sparse"


def run(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to continue, from a file", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", metavar=FLAG, help="Apply the chat template")
    ] = False,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "dip",
    density: Annotated[
        float | None,
        typer.Option(help=f"{DENSITY_HELP}; default {DEFAULT_DENSITY}", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make")] = 128,
    prefill: Annotated[
        Prefill, typer.Option(help="Process the prompt dense or sparse")
    ] = Prefill.DENSE,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens of this mass; default 1", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    calibration: Calibration = None,
    json: Json = False,
) -> None:
    """Generate text; it streams as it is made, and a summary follows.

    Example: dipnet run --prompt "Once upon a time" --method dip --density 0.5

    Example: dipnet run Qwen/Qwen3-0.6B --chat --prompt "Why is the sky blue?"
    """
    request = parse_method(method)
    planned = _plan(request, density)
    text = _prompt(prompt, prompt_file)
    quiet_libraries()
    sampling = _sampling(temperature, top_p, seed)
    fitted_on = calibration_text(model, calibration)
    loaded = load(model, device, dtype)
    from dipnet.eval.generate import encode_prompt

    tokens = encode_prompt(loaded, text, chat=chat)
    chosen = _ready(loaded, planned, fitted_on)
    made = _generate(loaded, chosen, tokens, max_new_tokens, prefill, sampling, show=not json)
    if json:
        print_json({**_about(loaded, request, chosen, text, prefill, sampling), **_figures(*made)})
    else:
        _summarise(request, chosen, *made)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InputError("give the prompt with either --prompt or --prompt-file")
    if prompt is not None:
        return prompt
    from dipnet.eval.texts import read_text

    assert file is not None
    return read_text(file).content


def _plan(request: MethodRequest, density: float | None) -> Method:
    """The method that was asked for, not yet calibrated."""
    if density is None and request.takes_density:
        density = DEFAULT_DENSITY
    return request.build(density)


def _sampling(temperature: float, top_p: float | None, seed: int) -> Sampling:
    """How tokens are drawn; InputError for a top-p that greedy decoding would ignore."""
    from dipnet.eval.generate import Sampling

    if top_p is not None and temperature == 0:
        raise InputError("--top-p has no effect at temperature 0: give --temperature too")
    return Sampling(temperature, 1.0 if top_p is None else top_p, seed=seed)


def _ready(loaded: LoadedModel, method: Method, fitted_on: Text | None) -> Method:
    """The method, calibrated where it needs that."""
    from dipnet.adapt.ready import Fitter
    from dipnet.eval.texts import bos_token

    text = calibration_tokens(loaded, fitted_on) if method.needs_calibration else None
    window = check_window(loaded, None)
    tokens = text.tokens if text else None
    return Fitter(loaded.model, window, tokens, bos=bos_token(loaded.tokenizer))(method)


def _generate(
    loaded: LoadedModel,
    method: Method,
    prompt: Tensor,
    max_new_tokens: int,
    prefill: Prefill,
    sampling: Sampling,
    *,
    show: bool,
) -> tuple[Generation, Density, int]:
    """The text made, the density of its tokens, and the peak of memory in bytes."""
    from dipnet.eval.generate import generate, peak_memory
    from dipnet.models.attach import sparsify, usage

    room = loaded.context - prompt.shape[1]
    if max_new_tokens > room:
        note(f"the context of {loaded.context} tokens has room for {room} new ones: stopping there")
    with sparsify(loaded.model, method, prefill=prefill.value):
        made = generate(
            loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            write=stream if show else None,
        )
        density = usage(loaded.model).density()
    if show:
        stream("\n")
    return made, density, peak_memory(loaded.model.device)


def _about(
    loaded: LoadedModel,
    request: MethodRequest,
    method: Method,
    prompt: str,
    prefill: Prefill,
    sampling: Sampling,
) -> dict[str, Any]:
    """What was asked for, for the JSON."""
    from dipnet.eval.report import model_json, versions
    from dipnet.eval.sweep import resolved_parameters
    from dipnet.models.families import describe

    return {
        "schema": SCHEMA,
        "versions": versions(),
        "model": model_json(loaded),
        "method": request.label,
        "parameters": resolved_parameters(method, describe(loaded.model)),
        "prefill": prefill.value,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "prompt": prompt,
    }


def _figures(made: Generation, density: Density, memory: int) -> dict[str, Any]:
    """What came out, for the JSON."""
    return {
        "text": made.text,
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": made.new_tokens,
        "stopped": "end of text" if made.ended else "length",
        "prompt_seconds": made.prompt_seconds,
        "decode_seconds": made.decode_seconds,
        "tokens_per_second": made.tokens_per_second,
        "density": asdict(density),
        "peak_memory_bytes": memory,
    }


def _summarise(
    request: MethodRequest, method: Method, made: Generation, density: Density, memory: int
) -> None:
    """The figures on stderr, so that stdout holds the text alone."""
    from rich.table import Table

    speed = made.tokens_per_second
    asked = getattr(method, "density", None)
    rows = {
        "method": request.label + (f", density {asked:g}" if asked else ""),
        "tokens": f"{made.prompt_tokens} of the prompt, {made.new_tokens} new",
        "prompt": f"{made.prompt_seconds:.2f} s",
        "decoding": f"{speed:.1f} tokens/s" if speed else "a single token: no rate",
        "MLP density": f"{density.mlp:.3f}",
        "of all weights": f"{density.total:.3f}, of which the method itself {density.added:.2g}",
        "peak memory": f"{memory / 2**20:.0f} MiB",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}[/]", value)
    err.print()
    err.print(grid)
