"""What `dipnet probe` makes us predict, against what the engine does: tokens a second.

    python benchmarks/simulated_vs_real.py [--folder DIR] [--store STORE ...] [--rounds 3]

Every round probes the machine, then lets each setting generate a text as `dipnet run` does, caches
empty at first; the prediction has that round's device file, the store's shapes and a trace of the
masks, recorded before. Nothing is fitted to what is measured. What others disturb, by more than 3 %
of the processors' time, is measured again, up to nine times. The texts of all rounds are the same,
and each of their tokens counts with its median. The settings are of the bundled demo-swiglu in all
kinds of weights, and of each STORE that is given. A table of medians over the rounds, then one JSON
line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import json_line, percent, print_table, undisturbed

import dipnet
from dipnet.cli.console import quiet_libraries
from dipnet.eval.generate import Generation, generate
from dipnet.models.load import LoadedModel, empty_model, load_config, load_tokenizer
from dipnet.models.recording import model_shape
from dipnet.pack.packing import pack
from dipnet.sim.clock import seconds
from dipnet.sim.device import load_device
from dipnet.sim.scenario import Run, Scenario, run
from dipnet.sim.shape import ModelShape
from dipnet.sim.target import own_target
from dipnet.sim.trace import Trace, open_trace
from dipnet.store.index import Index, read_index
from dipnet.streaming.attach import streamed
from dipnet.streaming.budget import CACHED

WITHIN = 0.15
"""The relative error that is aimed at."""
MODEL = "demo-swiglu"
PROMPT = "The morning after the storm the whole village went down to the harbour to see what was"
CONTEXT = 512
TEXTS = 2
"""Of a setting in every round."""


@dataclass(frozen=True)
class Setting:
    """A store and how it is decoded; ``share`` is the cache's of the MLP's records, None: all.

    ``density`` None is the dense model.
    """

    store: Path
    weights: str
    density: float | None
    gamma: float | None
    share: float | None
    look_ahead: bool

    @property
    def name(self) -> str:
        """What the table calls it."""
        masks = f"DIP {self.density:.0%}" if self.density else "dense"
        gamma = f", γ {self.gamma:g}" if self.gamma else ""
        held = f"cache {self.share:.0%}" if self.share else "in memory"
        ahead = ", look-ahead" if self.look_ahead and self.share else ""
        return f"{self.store.name} {self.weights}, {masks}{gamma}, {held}{ahead}"

    @property
    def method(self) -> Any:
        """What decodes."""
        if self.density is None:
            return dipnet.Dense()
        return dipnet.DIP(self.density, cache_aware=self.gamma)


@dataclass
class Result:
    """A setting's hits and misses, what was predicted of it, and what was measured.

    ``predicted`` has tokens/s for every probe, ``texts`` the seconds of every token of every text,
    ``others`` the share of the processors' time that others took from each.
    """

    run: Run
    past: int
    predicted: list[float] = field(default_factory=list)
    texts: list[tuple[float, ...]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """Tokens/s of the engine, each token of the text with the median of its seconds."""
        took = np.median(np.array(self.texts), axis=0)
        return len(took) / float(took.sum())

    @property
    def expected(self) -> float:
        """The median prediction."""
        return statistics.median(self.predicted)

    @property
    def error(self) -> float:
        """How much too fast the prediction is."""
        return self.expected / self.measured - 1


def demo_settings(folder: Path) -> Iterator[Setting]:
    """Budgets, densities, γ, weights, look-ahead on and off on the bundled model."""
    for weights, density, gamma, share, look_ahead in (
        ("int4", 0.5, None, None, True),
        ("int4", 0.5, None, 0.5, True),
        ("int4", 0.5, None, 0.5, False),
        ("int4", 0.5, 0.2, 0.25, True),
        ("int4", 0.35, 0.2, 0.5, False),
        ("int4", None, None, 0.5, True),
        ("int8", 0.5, None, 0.5, True),
        ("int8", 0.7, None, 0.25, False),
        ("bf16", 0.5, None, 0.5, False),
        ("bf16", 0.35, 0.5, 0.25, True),
    ):
        yield Setting(folder / weights, weights, density, gamma, share, look_ahead)


def store_settings(store: Path) -> Iterator[Setting]:
    """The same questions of a store that somebody else made."""
    weights = read_index(store).weights
    for density, gamma, share, look_ahead in (
        (0.5, None, None, True),
        (0.5, None, 0.25, True),
        (0.5, None, 0.25, False),
        (0.5, 0.2, 0.4, True),
        (0.35, 0.2, 0.25, False),
        (None, None, 0.5, True),
    ):
        yield Setting(store, weights, density, gamma, share, look_ahead)


def mlp_bytes(index: Index) -> int:
    """Bytes of all records that may be streamed."""
    return sum(group.bytes for group in index.groups if group.name in CACHED)


def decode(setting: Setting, tokens: int, trace: Path | None = None) -> tuple[Any, Generation, int]:
    """Load a store, caches empty, and let it generate; recorded when there is a ``trace``.

    The model, what was made, and the prompt's tokens.
    """
    size = (
        None if setting.share is None else int(setting.share * mlp_bytes(read_index(setting.store)))
    )
    model = dipnet.load(
        setting.store, setting.method, cache=size, context=512, look_ahead=setting.look_ahead
    )
    loaded = LoadedModel(str(setting.store), model, load_tokenizer(str(setting.store)))
    words = loaded.tokenizer(PROMPT)["input_ids"]
    prompt = torch.tensor([words])
    if trace is None:
        return model, generate(loaded, prompt, max_new_tokens=tokens), len(words)
    with dipnet.record(model, trace):
        made = generate(loaded, prompt, max_new_tokens=tokens)
    return model, made, len(words)


def shape_of(store: Path) -> ModelShape:
    """A store's shapes."""
    return model_shape(empty_model(load_config(str(store))), str(store))


def recorded(setting: Setting, tokens: int, folder: Path) -> Result:
    """The hits and misses that the setting's caches have for its own text."""
    file = folder / "trace"
    dense = setting.density is None
    model, made, past = decode(setting, tokens, None if dense else file)
    trace: Trace | None = None if dense else open_trace(file)
    index = read_index(setting.store)
    shape = shape_of(setting.store)
    target = own_target(shape, trace.sites if trace else ())
    slots = {key: held for key, held in streamed(model).engine.slots.items() if key[1] in CACHED}
    scenario = Scenario(2**62, "lfu", index.weights, past + tokens)
    return Result(run(target, scenario, trace, tokens=made.new_tokens - 1, slots=slots), past)


def predicted(setting: Setting, result: Result, device: Path) -> float:
    """Tokens/s on a device."""
    made = result.run
    took = seconds(
        load_device(device),
        made.target.shape,
        made.loads,
        context=made.positions + result.past,
        look_ahead=setting.look_ahead,
        recall=made.recall,
    )
    return len(took) / float(took.sum())


def probed(folder: Path) -> Path:
    """This machine's device file, as the command writes it."""
    file = folder / "device.json"
    command = [sys.executable, "-m", "dipnet", "probe", "--out", file, "--folder", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return file


def show(results: dict[Setting, Result]) -> None:
    """The table of all settings."""
    rows = []
    for setting, result in results.items():
        spread = f"{min(result.predicted):.1f} to {max(result.predicted):.1f}"
        figures = f"{result.expected:.1f}", f"{result.measured:.1f}", f"{result.error:+.0%}"
        rows.append((setting.name, *figures, spread))
    print_table(("tokens/s", "predicted", "measured", "error", "predictions"), rows)


def summary(results: dict[Setting, Result]) -> list[dict[str, Any]]:
    """Every setting's figures."""
    return [
        {
            **asdict(setting),
            "store": setting.store.name,
            "predicted": result.predicted,
            "measured": result.measured,
            "texts": [len(seconds) / sum(seconds) for seconds in result.texts],
            "others": result.others,
            "error": result.error,
        }
        for setting, result in results.items()
    ]


def settings_of(args: argparse.Namespace, folder: Path) -> Sequence[Setting]:
    """All settings; the bundled model is packed where it is not yet."""
    chosen = [setting for store in args.store for setting in store_settings(store)]
    if not args.store or args.demo:
        chosen = [*demo_settings(folder), *chosen]
        for kind in ("int4", "int8", "bf16"):
            if not (folder / kind).exists():
                pack(MODEL, folder / kind, kind)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="whose disk is measured")
    parser.add_argument("--store", type=Path, action="append", default=[])
    parser.add_argument("--demo", action="store_true", help="the bundled model too, with --store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65)
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        settings = settings_of(args, folder)
        results = {setting: recorded(setting, args.tokens, folder) for setting in settings}
        for number in range(args.rounds):
            print(f"round {number + 1}", file=sys.stderr, flush=True)
            device, _ = undisturbed(lambda: probed(folder))
            for setting, result in results.items():
                result.predicted.append(predicted(setting, result, device))
                for _ in range(TEXTS):
                    text, others = undisturbed(lambda s=setting: decode(s, args.tokens)[1])
                    result.texts.append(text.token_seconds)
                    result.others.append(others)
                figures = f"{result.predicted[-1]:.1f} predicted, {result.measured:.1f} measured"
                print(f"{setting.name}: {figures}", file=sys.stderr, flush=True)
        show(results)
    close = sum(abs(result.error) <= WITHIN for result in results.values())
    print(f"{close} of {len(results)} within {percent(WITHIN)}")
    figures = {"rounds": args.rounds, "tokens": args.tokens, "within": close}
    print(json_line({"benchmark": "simulated_vs_real", **figures, "settings": summary(results)}))


if __name__ == "__main__":
    main()
