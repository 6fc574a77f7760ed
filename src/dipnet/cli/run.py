"""``dipnet run``: generate text with a sparsified model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
    Backend,
    Calibration,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
)
from dipnet.cli.planned import PlanFile, planned
from dipnet.cli.streamed import (
    STORES,
    Memory,
    NoLookAhead,
    Policy,
    Streaming,
    Weights,
    decoding_json,
    show_decoding,
)
from dipnet.cli.tracing import Trace, TraceScores, Tracing
from dipnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.eval.generate import Generation, Sampling
    from dipnet.eval.texts import Text
    from dipnet.methods.base import Method
    from dipnet.models.load import LoadedModel
    from dipnet.models.usage import Density
    from dipnet.streaming.stats import Stats

SCHEMA = "dipnet.run/1"
DEFAULT_METHOD = "dip"
DEFAULT_DENSITY = 0.5


class Prefill(StrEnum):
    """How the prompt is processed."""

    DENSE = "dense"
    SPARSE = "sparse"


@dataclass(frozen=True)
class Outcome:
    """The text made, the density of its tokens, the peak of memory in bytes.

    ``stats`` are a packed model's of the decoded tokens; None for a checkpoint.
    """

    made: Generation
    density: Density
    memory: int
    stats: Stats | None


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
    method: Annotated[
        str | None,
        typer.Option(help=f"{METHOD_HELP}; default: {DEFAULT_METHOD}", show_default=False),
    ] = None,
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
    backend: Backend = "auto",
    memory: Memory = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Or the size of the record cache alone: 64MiB",
            show_default=False,
            rich_help_panel=STORES,
        ),
    ] = None,
    policy: Policy = None,
    no_look_ahead: NoLookAhead = False,
    weights: Weights = None,
    plan: PlanFile = None,
    trace: Trace = None,
    trace_scores: TraceScores = False,
    json: Json = False,
) -> None:
    """Generate text; it streams as it is made, and a summary follows.

    MODEL may also be a store that `dipnet pack` made: its weights then stay on disk, as far as
    --memory or --cache leave no room for them.

    Example: dipnet run --prompt "Once upon a time" --method dip --density 0.5

    Example: dipnet run Qwen/Qwen3-0.6B --chat --prompt "Why is the sky blue?"

    Example: dipnet run qwen3.dipnet --memory 1GiB --prompt "Once upon a time"
    """
    tracing = Tracing(trace, trace_scores)
    streaming = Streaming(memory, cache, policy, not no_look_ahead, weights)
    if plan:
        request, streaming = planned(plan, streaming, method, density)
        density = None  # it is in the request
    else:
        request = parse_method(method or DEFAULT_METHOD)
    built = _plan(request, density)
    text = _prompt(prompt, prompt_file)
    quiet_libraries()
    sampling = _sampling(temperature, top_p, seed)
    streams = streaming.streams(model, "auto", dtype)  # a packed model may run on a GPU, too
    streaming = replace(streaming, device="cpu" if device == "auto" else device)
    streaming.check([request])
    if streams and calibration:
        raise InputError("--calibration has no effect on a packed model: leave it out")
    if streams and backend != "auto":
        raise InputError("--backend has no effect on a packed model: leave it out")
    store = streaming.open(model, built) if streams else None
    if store is None:
        fitted_on = calibration_text(model, calibration)
        loaded = load(model, device, dtype)
        tokens = _encode(loaded, text, chat)
        chosen = _ready(loaded, built, fitted_on)
    else:
        loaded, tokens, chosen = _open(store, streaming, built, text, chat, max_new_tokens, prefill)
    with (
        _attached(loaded, chosen, prefill, store, backend),
        tracing.record(loaded.model, loaded.name),
    ):
        outcome = _generate(loaded, tokens, max_new_tokens, sampling, show=not json)
    if trace:
        note(f"saved {trace}")
    if json:
        about = _about(loaded, request, chosen, text, prefill, sampling)
        packed = {"streaming": streaming.as_json()} if store else {}
        print_json({**about, **packed, **_figures(outcome)})
    else:
        _summarise(request, chosen, outcome, streaming)


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


def _encode(loaded: LoadedModel, text: str, chat: bool) -> Tensor:
    from dipnet.eval.generate import encode_prompt

    return encode_prompt(loaded, text, chat=chat)


def _open(
    store: Path,
    streaming: Streaming,
    method: Method,
    text: str,
    chat: bool,
    max_new_tokens: int,
    prefill: Prefill,
) -> tuple[LoadedModel, Tensor, Method]:
    """A packed model with memory for this text and no more, the prompt's tokens, the method."""
    from dipnet.eval.generate import prompt_tokens
    from dipnet.models.attach import attached_method
    from dipnet.models.load import load_tokenizer
    from dipnet.store.index import read_index

    longest = read_index(store).context
    tokens = prompt_tokens(str(store), load_tokenizer(str(store)), longest, text, chat=chat)
    context = min(longest, tokens.shape[1] + max_new_tokens)
    loaded = streaming.load(store, method, context, prefill.value)
    return loaded, tokens.to(loaded.model.device), attached_method(loaded.model)


@contextmanager
def _attached(
    loaded: LoadedModel, method: Method, prefill: Prefill, store: Path | None, backend: str
) -> Iterator[None]:
    """The method on the model; a packed one was loaded with it."""
    from dipnet.models.attach import sparsify

    if store is None:
        with sparsify(loaded.model, method, prefill=prefill.value, backend=backend):
            yield
    else:
        yield


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
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    show: bool,
) -> Outcome:
    """Generate; what was written stays when an error or an interruption ends it."""
    from dipnet.eval.generate import generate, peak_memory
    from dipnet.models.attach import usage
    from dipnet.streaming.attach import is_streamed
    from dipnet.streaming.load import stats

    streams = is_streamed(loaded.model)
    room = loaded.context - prompt.shape[1]
    if max_new_tokens > room:
        note(f"the context of {loaded.context} tokens has room for {room} new ones: stopping there")
    of_prompt: list[Stats] = []
    written = False

    def write(text: str) -> None:
        nonlocal written
        written = True
        stream(text)

    try:
        made = generate(
            loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            write=write if show else None,
            decoding=(lambda: of_prompt.append(stats(loaded.model))) if streams else None,
        )
    except BaseException:
        if written:  # the error's line begins a line of its own
            stream("\n")
        raise
    if show:
        stream("\n")
    return Outcome(
        made,
        usage(loaded.model).density(),
        peak_memory(loaded.model.device),
        stats(loaded.model).since(of_prompt[0]) if streams else None,
    )


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


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What came out, for the JSON."""
    made, stats = outcome.made, outcome.stats
    return {
        "text": made.text,
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": made.new_tokens,
        "stopped": "end of text" if made.ended else "length",
        "prompt_seconds": made.prompt_seconds,
        "decode_seconds": made.decode_seconds,
        "tokens_per_second": made.tokens_per_second,
        "density": asdict(outcome.density),
        "peak_memory_bytes": outcome.memory,
        **({"decoding": decoding_json(stats, made.decode_seconds)} if stats else {}),
    }


def _summarise(
    request: MethodRequest, method: Method, outcome: Outcome, streaming: Streaming
) -> None:
    """The figures on stderr, so that stdout holds the text alone."""
    from rich.table import Table

    from dipnet.eval.report import OWN_ALLOCATION

    made, density = outcome.made, outcome.density
    speed = made.tokens_per_second
    asked = getattr(method, "density", None)
    divided = getattr(method, "allocated", None) and "allocation" not in request.options
    rows = {
        "method": request.label
        + (f", density {asked:g}" if asked else "")
        + (OWN_ALLOCATION if divided else ""),
        "tokens": f"{made.prompt_tokens} of the prompt, {made.new_tokens} new",
        "prompt": f"{made.prompt_seconds:.2f} s",
        "decoding": f"{speed:.1f} tokens/s" if speed else "a single token: no rate",
        "MLP density": f"{density.mlp:.3f}",
        "of all weights": f"{density.total:.3f}, of which the method itself {density.added:.2g}",
        "peak memory": f"{outcome.memory / 2**20:.0f} MiB"
        + (f" of a budget of {streaming.memory}" if streaming.memory else ""),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}[/]", value)
    err.print()
    err.print(grid)
    if outcome.stats and speed:
        show_decoding(outcome.stats, made.decode_seconds)
