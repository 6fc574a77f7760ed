"""Are plans kept? Perplexity on other text and the speed of `dipnet run`, against the promise.

    python benchmarks/plan_kept.py [--folder DIR] [--model demo-swiglu] [--increase 5%] [--rounds 3]

Every round measures this machine with `dipnet probe`; then `dipnet plan` makes a plan for each of
three budgets of a bundled model on the bundled calibration text, and `dipnet run --plan` generates
texts with all of them in turn, since the machine's speed changes from minute to minute. A probe or
a text during which others took more than 3 % of the processors' time is made again, up to nine
times. At last every plan's perplexity is measured on the held-out text with `dipnet.load(store,
plan=...)`: the worst one counts. A promise is the median over the rounds, a speed that over all
texts. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulated_vs_real import PROMPT, mlp_bytes, probed
from timing import json_line, percent, print_table, undisturbed

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
TEXTS = 4
"""Of each plan in a round."""
TOKENS = 257
WINDOW = 256


def dipnet_json(*arguments: object) -> Any:
    """What a command prints with --json."""
    command = [sys.executable, "-m", "dipnet", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def made(store: Path, share: float | None, increase: str, device: Path, file: Path) -> Plan:
    """The plan of a budget on a device, as the command makes it."""
    budget = [] if share is None else ["--cache", int(share * mlp_bytes(read_index(store)))]
    bound = ("--max-ppl-increase", increase)
    dipnet_json("plan", store, *budget, *bound, "--device", device, "--out", file)
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


@dataclass
class Budget:
    """A budget's plans, one a round, and the tokens/s of every text that came of them.

    ``others`` are the shares of the processors' time that others took from each text.
    """

    share: float | None
    plans: list[Plan] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def promised(self) -> float:
        """Tokens/s, the median of the plans."""
        return statistics.median(plan.expected.tokens_per_second for plan in self.plans)

    @property
    def measured(self) -> float:
        """Tokens/s, the median of the texts."""
        return statistics.median(self.speeds)


def played(store: Path, budgets: list[Budget], device: Path, increase: str) -> None:
    """One round: a plan for every budget, and texts that the plans generate in turn."""
    files = [store.parent / f"plan-{number}.json" for number in range(len(budgets))]
    for budget, file in zip(budgets, files, strict=True):
        budget.plans.append(made(store, budget.share, increase, device, file))
    for budget, file in TEXTS * list(zip(budgets, files, strict=True)):
        speed, others = undisturbed(lambda file=file: measured(store, file))
        budget.speeds.append(speed)
        budget.others.append(others)
    for budget in budgets:
        plan, speeds = budget.plans[-1], budget.speeds[-TEXTS:]
        figures = " ".join(f"{speed:.1f}" for speed in speeds)
        promised = f"{plan.expected.tokens_per_second:.1f} promised, {figures} measured"
        others = percent(max(budget.others[-TEXTS:]), 1)
        print(
            f"{named(budget)}, {plan.method}: {promised}, others took {others}",
            file=sys.stderr,
            flush=True,
        )


def named(budget: Budget) -> str:
    """What the table calls it."""
    return "in memory" if budget.share is None else f"cache {budget.share:.0%}"


def kept(store: Path, budget: Budget, dense: float, windows: int) -> dict[str, Any]:
    """What became of a budget's plans."""
    different = {(plan.method, plan.policy, plan.cache_split): plan for plan in budget.plans}
    increases = {
        ", ".join(each): perplexity(store, windows, plan) / dense - 1
        for each, plan in different.items()
    }
    bound = budget.plans[0].max_increase
    return {
        "cache_share": budget.share,
        "methods": [plan.method for plan in budget.plans],
        "promised_increases": [plan.expected.increase for plan in budget.plans],
        "increases": increases,
        "bound": bound,
        "inside": max(increases.values()) <= bound,
        "promised": [plan.expected.tokens_per_second for plan in budget.plans],
        "measured": budget.speeds,
        "others": budget.others,
        "error": budget.promised / budget.measured - 1,
        "kept": abs(math.log(budget.promised / budget.measured)) <= math.log(1 + WITHIN),
    }


def cells(budget: Budget, row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    return (
        named(budget),
        " ".join(dict.fromkeys(row["methods"])),
        percent(max(row["promised_increases"]), 2),
        percent(max(row["increases"].values()), 2),
        "yes" if row["inside"] else "NO",
        " ".join(f"{speed:.1f}" for speed in row["promised"]),
        f"{budget.measured:.1f} ({min(budget.speeds):.1f} to {max(budget.speeds):.1f})",
        f"{row['error']:+.0%}",
        "yes" if row["kept"] else "NO",
    )


HEADER = ("budget", "plans", "promised", "increase", "inside", "promised/s", "measured/s", "error")


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
        budgets = [Budget(share) for share in SHARES]
        for number in range(args.rounds):
            print(f"round {number + 1}", file=sys.stderr, flush=True)
            device, others = undisturbed(lambda: probed(Path(folder)))
            print(f"probed, others took {percent(others, 1)}", file=sys.stderr, flush=True)
            played(store, budgets, device, args.increase)
        dense = perplexity(store, args.windows, None)
        rows = [kept(store, budget, dense, args.windows) for budget in budgets]
    print_table((*HEADER, "kept"), map(cells, budgets, rows))
    settings = {"model": args.model, "rounds": args.rounds, "windows": args.windows}
    print(json_line({"benchmark": "plan_kept", **settings, "budgets": rows}))


if __name__ == "__main__":
    main()
