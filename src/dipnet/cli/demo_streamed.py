"""The demo's last part: the bundled model streamed from disk, dense, with DIP and with DIP-CA."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipnet.cli.console import out, stream, titled_table
from dipnet.cli.inputs import tokens_of
from dipnet.cli.methods import MethodRequest, parse_method
from dipnet.cli.progress import byte_progress
from dipnet.cli.streamed import DEFAULT_POLICY, Streaming, decoding_json, shapes_of
from dipnet.cli.sweeping import measure_store

if TYPE_CHECKING:
    from dipnet.eval.generate import Generation
    from dipnet.eval.sweep import Measured
    from dipnet.streaming.stats import Stats

MODEL = "demo-swiglu"
METHODS = ("dense", "dip", "dip:cache_aware=0.5")
DENSITY = 0.5
CACHE_SHARE = 1 / 3
"""Of the bytes of the MLP's records."""
NEW_TOKENS = 40
WINDOWS = 2

INTRODUCTION = """\
Now as if the model did not fit into memory. It is packed in 4 bits; attention and the head stay in
memory, and of the MLP's {total} only a cache of {cache} does. Everything else is read from
disk when a token needs it. Dense streaming needs the whole MLP, DIP half of it, and DIP-CA prefers
those of its weights that are in memory already.
"""
HONESTY = """\
The texts are greedy; perplexity and hits are of the first {windows} windows of the held-out text,
from an empty cache on. A model this small has records of {record}: a disk reads through the gaps
between them sooner than it begins anew, so that DIP reads more bytes here than it wants, and dense
streaming, which needs no choice, can be the fastest. docs/results.md is about models with records
that are large enough.
"""


@dataclass(frozen=True)
class Streamed:
    """What one method did on the packed model."""

    label: str
    made: Generation
    stats: Stats
    measured: Measured


def show_streamed(prompt: str) -> list[dict[str, Any]]:
    """Stream the bundled model with every method; returns the figures for the JSON."""
    from dipnet.pack.packing import pack
    from dipnet.streaming.budget import CACHED, size_text

    with tempfile.TemporaryDirectory(prefix="dipnet-demo-") as folder:
        store = Path(folder) / MODEL
        with byte_progress(f"packing {MODEL}") as progress:
            index = pack(MODEL, store, "int4", progress=progress)
        total = sum(group.bytes for group in index.groups if group.name in CACHED)
        cache = int(total * CACHE_SHARE)
        out.rule("[bold]larger than memory[/]", align="left")
        words = {"total": size_text(total), "cache": size_text(cache)}
        out.print(INTRODUCTION.format(**words), soft_wrap=True, markup=False)
        requests = [parse_method(label) for label in METHODS]
        texts = [_continue(store, request, cache, prompt) for request in requests]
        rows = _measure(store, requests, cache)
    found = [
        Streamed(request.label, *text, measured)
        for request, text, measured in zip(requests, texts, rows, strict=True)
    ]
    _print_table(found)
    record = size_text(index.group(0, "mlp.in").record_bytes)
    note = HONESTY.format(windows=WINDOWS, record=record)
    out.print(note, style="dim", soft_wrap=True, markup=False)
    return [_json(each, cache) for each in found]


def _density(request: MethodRequest) -> float | None:
    return DENSITY if request.takes_density else None


def _continue(
    store: Path, request: MethodRequest, cache: int, prompt: str
) -> tuple[Generation, Stats]:
    """Continue the prompt from disk; the text streams under a heading."""
    from dipnet.eval.generate import encode_prompt, generate
    from dipnet.streaming.load import stats

    out.print(f"[bold]{request.label}[/]")
    out.print(prompt, style="dim", end="", soft_wrap=True)
    method = request.build(_density(request))
    loaded = Streaming(cache=str(cache)).load(store, method, shapes_of(store).context)
    of_prompt: list[Stats] = []
    made = generate(
        loaded,
        encode_prompt(loaded, prompt),
        max_new_tokens=NEW_TOKENS,
        write=stream,
        decoding=lambda: of_prompt.append(stats(loaded.model)),
    )
    stream("\n\n")
    return made, stats(loaded.model).since(of_prompt[0])


def _measure(store: Path, requests: list[MethodRequest], cache: int) -> list[Measured]:
    """Perplexity and hits of the methods on the bundled held-out text."""
    from dipnet.eval.streamed import StoreSetting
    from dipnet.eval.sweep import DENSE, Job, Setting
    from dipnet.eval.texts import bundled_text

    shapes = shapes_of(store)
    setting = Setting(shapes.context, shapes.context)
    tokens = setting.first(tokens_of(shapes, bundled_text("heldout")).tokens, WINDOWS)
    jobs = [
        DENSE
        if request.name == "dense"
        else Job(request.label, _density(request), request.build(_density(request)))
        for request in requests
    ]
    rows = measure_store(store, jobs, tokens, setting, StoreSetting(cache, DEFAULT_POLICY))
    found = [row.measured for row in rows if row.measured]
    assert len(found) == len(rows), "dense and DIP can always be measured"
    return found


def _print_table(found: list[Streamed]) -> None:
    made = titled_table(
        "From disk, a third of the MLP in memory",
        ["method"],
        ["MLP density", "tokens/s", "MiB read a token", "hits", "perplexity"],
    )
    for each in found:
        speed, used = each.made.tokens_per_second, each.measured.store
        assert used is not None, "it was measured on a store"
        made.add_row(
            each.label,
            f"{each.measured.density.mlp:.3f}",
            f"{speed:.1f}" if speed else "–",
            f"{each.stats.bytes_read / max(1, each.stats.calls) / 2**20:.2f}",
            f"{used.hit_rate:.3f}",
            f"{each.measured.perplexity.perplexity:.2f}",
        )
    out.print(made)


def _json(each: Streamed, cache: int) -> dict[str, Any]:
    return {
        "method": each.label,
        "density": asdict(each.measured.density),
        "cache": cache,
        "policy": DEFAULT_POLICY,
        "text": each.made.text,
        "new_tokens": each.made.new_tokens,
        "tokens_per_second": each.made.tokens_per_second,
        "decoding": decoding_json(each.stats, each.made.decode_seconds),
        "perplexity": each.measured.perplexity.perplexity,
        "store": each.measured.store and asdict(each.measured.store),
    }
