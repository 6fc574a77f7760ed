"""What adapters win back: perplexity at three densities, with a cache, and from a packed model.

    python benchmarks/adapt.py --data FOLDER --out FOLDER [--text gutenberg/valid.txt] [--steps N]

FOLDER holds the texts that adapters learn from and gutenberg/test.txt, plain or as .xz; perplexity
is that of the first windows of the test books, in float32. The references are the dense model, and
the dense model adapted on the same text by the same number of steps (its loss is cross-entropy: it
has nothing to distil). With a cache, perplexity and hits are those of the true cache, token after
token, on the CPU; its masks are those of --cached-method. Each part is kept in OUT/results.json
when it is done, and not done again: an interrupted run goes on, and --parts may run side by side.
--method and --model take what else
was fitted; thresholds are fitted on the training text, again for each model. Speed is in tokens of
training a second; the physical limit is the arithmetic alone (a pass forward of the dense model and
one of the masked one, and two such for the gradients of activations and weights), at the rate of a
large matrix product of that dtype, which is measured in the same run. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from adapt_tables import CACHED, cached_table, table
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.adapt.stand_in import StandInAttachment
from dipnet.cache import CacheSettings
from dipnet.cli.methods import parse_method
from dipnet.files import make_folder, write_file
from dipnet.methods.base import Method
from dipnet.models.attach import Attachment
from dipnet.models.families import Decoder
from dipnet.models.load import LoadedModel, load_model
from dipnet.pack.packing import pack

WINDOW = 512
DENSITIES = (0.5, 0.4, 0.3)
CACHED_DENSITY = 0.5
GAMMA = 0.2
SHARE = 0.5
STAND_IN_WINDOWS = 8
PIECE = 400_000  # characters that are tokenized at a time, in parallel
CALIBRATED = 128  # windows of the training text on which thresholds are fitted
PARTS = (
    *("limit", "dense", "densities", "train-plain", "train-cached", "cached-dense"),
    *(f"cached-{label}" for label in CACHED),
    *("stand-in", "packed"),
)
PASSES = 4  # of the arithmetic of a pass forward: dense, masked, two for the gradients


class Benchmark:
    """The parts, and what is known of them so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = make_folder(options.out)
        self.file = self.out / "results.json"
        self.loaded = load_model(options.model, device=options.device)
        self.found = self._kept()
        self._texts: dict[str, Tensor] = {}

    def once(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part's result; computed and kept where it is not there yet."""
        if name not in self.found:
            result = part()
            with FileLock(self.out / "results.lock"):
                self.found = self._kept() | {name: result}
                write_file(self.file, json.dumps(self.found, indent=2) + "\n")
            print(f"{name}: {json.dumps(result)}", flush=True)
        return self.found[name]

    def _kept(self) -> dict[str, Any]:
        """What this run and others have found so far."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def tokens(self, names: Sequence[str]) -> Tensor:
        """The tokens of some texts, one after the other."""
        for name in names:
            if name not in self._texts:
                most = None if name == self.options.test else self.options.characters
                self._texts[name] = tokens_of(self.loaded, self.options.data / name, most)
        return torch.cat([self._texts[name] for name in names])

    def method(self, density: float | None) -> Method:
        """The method that was asked for, at a density."""
        request = parse_method(self.options.method)
        return request.build(density if request.takes_density else None)

    def cached_method(self, gamma: float) -> Method:
        """The method that was asked for with a cache, preferring what is there."""
        request = parse_method(self.options.cached_method)
        return replace(request.build(CACHED_DENSITY), cache_aware=gamma)

    def calibrated(self, model: PreTrainedModel, method: Method) -> Method:
        """The method, fitted on the training text where it has to be."""
        if not method.needs_calibration:
            return method
        tokens = self.tokens(self.options.text)[: CALIBRATED * WINDOW]
        return dipnet.calibrate(model, method, tokens, window=WINDOW)

    def perplexity(
        self, model: PreTrainedModel, method: Method, cache: CacheSettings | None = None
    ) -> dict[str, Any]:
        """Of the test text; with the hit rate where there is a cache."""
        count = self.options.cached_windows if cache else self.options.windows
        tokens = self.tokens([self.options.test])[: count * WINDOW]
        fitted = self.calibrated(model, method)
        with dipnet.sparsify(model, fitted, cache=cache, backend="reference") as sparse:
            found = dipnet.perplexity(sparse, tokens, window=WINDOW, batch_size=16)
            usage = dipnet.usage(sparse)
            said = {"perplexity": found.perplexity, "mlp_density": usage.density().mlp}
            return said | ({"hit_rate": usage.cache().hit_rate} if cache else {})

    def trained(self, name: str, method: Method, **settings: Any) -> dict[str, Any]:
        """Train adapters where there are none yet; how long it took."""

        def part() -> dict[str, Any]:
            chosen = {"steps": self.options.steps, "batch": self.options.batch}
            chosen |= {"rate": self.options.rate, "rank": self.options.rank} | settings
            tokens = self.tokens(self.options.text)
            fitted = self.calibrated(self.loaded.model, method)
            began = time.perf_counter()
            made = dipnet.fit_adapters(
                self.loaded.model, fitted, tokens, out=self.out / name, window=WINDOW, **chosen
            )
            card = made.card
            shutil.rmtree(made.merged)
            return {
                "seconds": time.perf_counter() - began,
                "training_seconds": card["seconds"]["training"],
                "tokens": card["tokens"]["trained"],
                "tokens_per_second": card["tokens"]["trained"] / card["seconds"]["training"],
                "held_out": card["perplexity"],
                "history": card["history"],
            }

        return self.once(f"training {name}", part)

    def fresh(self, device: str) -> PreTrainedModel:
        """The model as it was before any adapter."""
        return load_model(self.options.model, device=device).model

    def adapted(self, name: str, device: str) -> PreTrainedModel:
        """The model with the adapters of a training merged by PEFT."""
        from peft import PeftModel

        model = self.fresh(device)
        return PeftModel.from_pretrained(model, self.out / name / "adapter").merge_and_unload()

    def dense(self) -> None:
        """The dense model, and what adapters make of it."""
        device = str(self.loaded.model.device)
        dense = dipnet.Dense()
        self.once("dense", lambda: self.perplexity(self.loaded.model, dense))
        self.trained("dense", dense, kl=0.0, cross_entropy=1.0)
        self.once("dense adapted", lambda: self.perplexity(self.adapted("dense", device), dense))

    def densities(self) -> None:
        """Each density without adapters and with them."""
        device = str(self.loaded.model.device)
        for density in self.options.densities:
            method, name = self.method(density), f"density-{density:g}"
            self.once(f"masked {density:g}", lambda m=method: self.perplexity(self.loaded.model, m))
            self.trained(name, method, **self.losses())
            self.once(
                f"adapted {density:g}",
                lambda m=method, n=name: self.perplexity(self.adapted(n, device), m),
            )

    def losses(self) -> dict[str, float]:
        names = ("kl", "cross_entropy", "hidden")
        return {name: getattr(self.options, name) for name in names}

    def cache(self) -> CacheSettings:
        return CacheSettings(SHARE, self.options.policy)

    def train_plain(self) -> None:
        """Adapters that learn without a cache, where the density's part has none of that method."""
        if self.options.cached_method != self.options.method:
            self.trained("plain", self.cached_method(1.0), **self.losses())

    def train_cached(self) -> None:
        """Adapters that learn under cache-aware masks."""
        method = self.cached_method(GAMMA)
        self.trained("cached", method, cache=self.cache(), **self.losses())

    def cached_dense(self) -> None:
        """The dense model on the text that is measured with a cache."""
        tokens = self.tokens([self.options.test])[: self.options.cached_windows * WINDOW]
        model = self.fresh("cpu")
        self.once(
            "cache dense",
            lambda: {"perplexity": dipnet.perplexity(model, tokens, window=WINDOW).perplexity},
        )

    def cached(self, label: str) -> None:
        """With the true cache: no adapters, adapters trained without it, and with the stand-in."""
        same = self.options.cached_method == self.options.method
        plain = f"density-{CACHED_DENSITY:g}" if same else "plain"
        name = {"none": None, "plain": plain, "cached": "cached"}[label]
        model = self.adapted(name, "cpu") if name else self.fresh("cpu")
        for gamma in (1.0, GAMMA):
            method = self.cached_method(gamma)
            self.once(
                f"cache {label} {gamma:g}",
                lambda x=method: self.perplexity(model, x, self.cache()),
            )

    def stand_in(self) -> None:
        """Perplexity and hits with the true cache and with its stand-in: without adapters, and with
        those that were trained under the stand-in, where there are any."""
        models = {"": self.fresh("cpu")}
        if (self.out / "cached").exists():
            models["adapted "] = self.adapted("cached", "cpu")
        method = self.cached_method(GAMMA)
        tokens = self.tokens([self.options.test])[: STAND_IN_WINDOWS * WINDOW]

        def part(
            model: PreTrainedModel, cache: CacheSettings, rounds: int | None
        ) -> dict[str, Any]:
            attachment: Attachment = (
                StandInAttachment(Decoder(model), method, cache, rounds)
                if rounds
                else Attachment(Decoder(model), method, cache=cache)
            )
            attachment.attach()
            try:
                found = dipnet.perplexity(model, tokens, window=WINDOW, batch_size=STAND_IN_WINDOWS)
            finally:
                attachment.detach()
            hits = attachment.usage.cache().hit_rate
            return {"perplexity": found.perplexity, "hit_rate": hits}

        for (kind, model), policy in itertools.product(models.items(), ("lru", "lfu")):
            cache = CacheSettings(SHARE, policy)
            for rounds in (None, 1, 2, 4, 8):
                label = f"{rounds} rounds" if rounds else "true"
                self.once(f"stand-in {kind}{policy} {label}", partial(part, model, cache, rounds))

    def packed(self) -> None:
        """The merged checkpoint packed, and its perplexity from the store beside torch's."""
        method = self.method(CACHED_DENSITY)
        tokens = self.tokens([self.options.test])[: self.options.packed_windows * WINDOW]
        merged, store = self.out / "merged", self.out / "store"

        def part(weights: str) -> dict[str, Any]:
            for folder in (merged, store):
                shutil.rmtree(folder, ignore_errors=True)
            model = self.adapted(f"density-{CACHED_DENSITY:g}", "cpu")
            model.save_pretrained(merged)
            self.loaded.tokenizer.save_pretrained(merged)
            pack(str(merged), store, weights)
            fitted = self.calibrated(model, method)
            with dipnet.sparsify(model, fitted) as sparse:
                in_torch = dipnet.perplexity(sparse, tokens, window=WINDOW).perplexity
            streamed = dipnet.load(store, fitted, memory=self.options.memory, prefill="sparse")
            from_store = dipnet.perplexity(streamed, tokens, window=WINDOW).perplexity
            return {"torch": in_torch, "store": from_store}

        for weights in ("int8", "int4"):
            self.once(f"packed {weights}", lambda w=weights: part(w))

    def rate(self) -> dict[str, Any]:
        """Tokens a second that the arithmetic alone allows."""
        device = self.loaded.model.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = 8192 if device.type == "cuda" else 1024
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(8):
            _wait(device)
            began = time.perf_counter()
            left @ right
            _wait(device)
            seconds.append(time.perf_counter() - began)
        flops = 2 * size**3 / sorted(seconds)[len(seconds) // 2]
        weights = dipnet.describe(self.loaded.model).weights_per_token
        return {"tflops": flops / 1e12, "tokens_per_second": flops / (PASSES * 2 * weights)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of(loaded: LoadedModel, path: Path, most: int | None = None) -> Tensor:
    """The tokens of a text's first characters, plain or .xz: pieces in parallel, at blank lines."""
    with path.open("rb") if path.is_file() else lzma.open(f"{path}.xz") as opened:
        text = TextIOWrapper(opened, encoding="utf-8").read(most)
    pieces, at = [], 0
    while at < len(text):
        end = text.find("\n\n", at + PIECE)
        end = len(text) if end < 0 else end
        pieces.append(text[at:end])
        at = end
    ids = loaded.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)
    return torch.tensor(list(itertools.chain.from_iterable(ids["input_ids"])))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="adapters and results.json")
    parser.add_argument("--model", default="demo-swiglu", help="or a folder")
    parser.add_argument("--text", nargs="+", default=["gutenberg/valid.txt"])
    parser.add_argument("--test", default="gutenberg/test.txt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--method", default="dip", help="dip with options, without a density")
    parser.add_argument("--cached-method", default="dip", help="what takes cache_aware")
    parser.add_argument("--characters", type=int, help="of each training text, at most")
    parser.add_argument("--before", type=Path, help="results.json whose masked models' gap counts")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--cross-entropy", type=float, default=0.0)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--windows", type=int, default=256, help="of the test text")
    parser.add_argument("--cached-windows", type=int, default=16, help="of it, with the cache")
    parser.add_argument("--packed-windows", type=int, default=2, help="of it, from a store")
    parser.add_argument("--memory", default="3GiB", help="of the packed model's process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="not all of them, in this order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    run = Benchmark(options)
    parts: dict[str, Callable[[], object]] = {
        "limit": lambda: run.once("limit", run.rate),
        "dense": run.dense,
        "densities": run.densities,
        "train-plain": run.train_plain,
        "train-cached": run.train_cached,
        "cached-dense": run.cached_dense,
        **{f"cached-{label}": partial(run.cached, label) for label in CACHED},
        "stand-in": run.stand_in,
        "packed": run.packed,
    }
    for name in options.parts or parts:
        parts[name]()
    result: dict[str, Any] = {"benchmark": "adapt", "model": options.model}
    result |= {"method": options.method, "text": options.text, "steps": options.steps}
    result |= {"characters": options.characters}
    before = json.loads(options.before.read_text()) if options.before else run.found
    if "dense adapted" in run.found:
        there = [d for d in options.densities if f"adapted {d:g}" in run.found]
        measured = [d for d in there if f"masked {d:g}" in before]
        result["densities"] = table(run.found, measured, before)
    needed = [f"cache {label} {gamma:g}" for label in CACHED for gamma in (1.0, GAMMA)]
    if all(name in run.found for name in ("cache dense", *needed)):
        result["cache"] = cached_table(run.found, GAMMA)
    kept = ("packed ", "stand-in ")
    result |= {name: part for name, part in run.found.items() if name.startswith(kept)}
    result["tokens_per_second"] = {
        name.removeprefix("training "): part["tokens_per_second"]
        for name, part in run.found.items()
        if name.startswith("training ")
    }
    result["limit"] = run.found.get("limit")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
