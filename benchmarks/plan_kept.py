"""Are plans kept? Perplexity on other text and the speed of `dipnet run`, against the promise.

    python benchmarks/plan_kept.py [--folder DIR] [--model demo-swiglu] [--increase 5%] [--rounds 3]

For three budgets of a bundled model, `dipnet plan` measures this machine and makes a plan on the
bundled calibration text; then the held-out text is measured with `dipnet.load(store, plan=...)`,
and `dipnet run --plan` generates text. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from simulated_vs_real import PROMPT, mlp_bytes
from timing import json_line, percent, print_table

import dipnet
from dipnet.cli.console import quiet_libraries
from dipnet.eval.texts import bos_token, bundled_text, tokenize
from dipnet.models.load import DEMO_MODELS, load_tokenizer
from dipnet.pack.packing import pack
from dipnet.store.index import read_index
from dipnet.streaming.plan import Plan, open_plan

WITHIN = 0.15
"""Of the promised speed."""
SHARES = (None, 0.5, 0.25)
"""The budgets: everything in memory, and caches of a part of the MLP's records."""
TOKENS = 257
WINDOW = 256


def dipnet_json(*arguments: object) -> Any:
    """What a command prints with --json."""
    command = [sys.executable, "-m", "dipnet", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def made(store: Path, share: float | None, increase: str, file: Path) -> Plan:
    """The plan of a budget, as the command makes it, from a fresh probe."""
    budget = [] if share is None else ["--cache", int(share * mlp_bytes(read_index(store)))]
    dipnet_json("plan", store, *budget, "--max-ppl-increase", increase, "--out", file)
    return open_plan(file)


def perplexity(store: Path, windows: int, plan: Plan | None) -> float:
    """Of the first windows of the held-out text, with a plan or dense."""
    tokenizer = load_tokenizer(str(store))
    bos = bos_token(tokenizer)
    body = WINDOW - (bos is not None)
    tokens = tokenize(tokenizer, bundled_text("heldout").content)[: windows * body]
    model = dipnet.load(store, plan=plan, context=WINDOW, prefill="sparse")
    return dipnet.perplexity(model, tokens, window=WINDOW, bos=bos).perplexity


def measured(store: Path, file: Path) -> float:
    """Tokens/s of `dipnet run` with the plan."""
    options = ("--prompt", PROMPT, "--max-new-tokens", TOKENS)
    return float(dipnet_json("run", store, "--plan", file, *options)["tokens_per_second"])


def kept(store: Path, share: float | None, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A budget's plan, and what became of it."""
    plan = made(store, share, args.increase, file)
    speeds = [measured(store, file) for _ in range(args.rounds)]
    dense = perplexity(store, args.windows, None)
    increase = perplexity(store, args.windows, plan) / dense - 1
    speed = statistics.median(speeds)
    promised = plan.expected.tokens_per_second
    return {
        "cache_share": share,
        "method": plan.method,
        "policy": plan.policy,
        "cache_split": plan.cache_split,
        "promised_increase": plan.expected.increase,
        "increase": increase,
        "bound": plan.max_increase,
        "inside": increase <= plan.max_increase,
        "promised": promised,
        "measured": speeds,
        "error": promised / speed - 1,
        "kept": abs(math.log(promised / speed)) <= math.log(1 + WITHIN),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    share = row["cache_share"]
    return (
        "in memory" if share is None else f"cache {share:.0%}",
        row["method"],
        percent(row["promised_increase"], 2),
        percent(row["increase"], 2),
        "yes" if row["inside"] else "NO",
        f"{row['promised']:.1f}",
        " ".join(f"{speed:.1f}" for speed in row["measured"]),
        f"{row['error']:+.0%}",
        "yes" if row["kept"] else "NO",
    )


HEADER = ("budget", "method", "promised", "increase", "inside", "promised/s", "measured/s", "error")


def main() -> None:
    """Plan and measure every budget, end with one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="whose disk is used")
    parser.add_argument("--model", choices=DEMO_MODELS, default="demo-swiglu")
    parser.add_argument("--increase", default="5%", help="the bound on perplexity")
    parser.add_argument("--windows", type=int, default=16, help=f"held out, of {WINDOW} tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Path(folder) / args.model
        pack(args.model, store)
        rows = [kept(store, share, Path(folder) / "plan.json", args) for share in SHARES]
    print_table((*HEADER, "kept"), map(cells, rows))
    settings = {"model": args.model, "rounds": args.rounds, "windows": args.windows}
    print(json_line({"benchmark": "plan_kept", **settings, "budgets": rows}))


if __name__ == "__main__":
    main()
