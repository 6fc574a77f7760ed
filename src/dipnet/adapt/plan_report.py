"""A choice as the plan that is written, and as the table that explains it."""

from __future__ import annotations

from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dipnet.adapt.plan import Candidate, Choice
from dipnet.adapt.trials import Setup, Trials
from dipnet.eval.report import OWN_ALLOCATION
from dipnet.eval.texts import Text
from dipnet.models.recording import method_text
from dipnet.store.index import read_index
from dipnet.streaming.budget import Needs, size_text
from dipnet.streaming.methods import takes_allocation
from dipnet.streaming.plan import Expected, Identity, Measured, Plan

DASH = "–"
LEFT = ("", "method", "evicts", "shares")
RIGHT = ("density", "inputs", "neurons", "block", "perplexity", "at most", "hits", "MiB/token")
SPEED = "tokens/s"


def plan_of(
    choice: Choice, trials: Trials, needs: Needs, memory: int | None, cache: int | None, text: Text
) -> Plan:
    """The chosen setting as a plan; ``memory`` and ``cache`` are the bounds that were asked for."""
    task, chosen = trials.task, choice.chosen
    index = read_index(trials.store(chosen.setup.block))
    return Plan(
        model=Identity.of(index),
        method=method_text(chosen.setup.method(chosen.density)),
        weights=index.weights,
        block=chosen.setup.block,
        memory=memory,
        cache=cache,
        policy=chosen.setup.policy,
        cache_split=chosen.setup.cache_split,
        context=task.context,
        device=task.device.name,
        max_increase=task.max_increase,
        text=Measured(
            name=text.name, sha256=text.sha256, windows=len(task.windows), window=task.window
        ),
        expected=_expected(choice, trials, needs),
    )


def _expected(choice: Choice, trials: Trials, needs: Needs) -> Expected:
    figures, dense = choice.chosen.figures, choice.dense.figures
    assert figures is not None
    assert dense is not None
    increase = choice.chosen.increase
    return Expected(
        tokens_per_second=figures.tokens_per_second,
        dense_tokens_per_second=dense.tokens_per_second,
        memory=needs.total + figures.cached,
        perplexity=trials.dense_perplexity * (1 + increase.mean),
        dense_perplexity=trials.dense_perplexity,
        increase=increase.mean,
        increase_at_most=increase.at_most,
        density=figures.density,
        hit_rate=figures.hit_rate,
        bytes_per_token=figures.bytes_per_token,
    )


def table(choice: Choice, trials: Trials) -> Table:
    """All candidates, the chosen one marked; a dash where the bound was not kept."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column in LEFT:
        made.add_column(column, no_wrap=True)
    for column in (*RIGHT, SPEED):
        made.add_column(column, justify="right", no_wrap=True)
    for candidate in choice.candidates:
        chosen = candidate is choice.chosen
        made.add_row(*_cells(candidate, trials, chosen=chosen), style="bold" if chosen else None)
    return made


def _cells(candidate: Candidate, trials: Trials, *, chosen: bool) -> list[str]:
    setup, figures, increase = candidate.setup, candidate.figures, candidate.increase
    inputs, neurons = _densities(candidate, trials)
    hits = figures.hit_rate if figures else None
    return [
        "→" if chosen else "",
        _method(setup, candidate.density),
        setup.policy,
        setup.cache_split,
        "1" if candidate.density is None else f"{candidate.density:g}",
        inputs,
        neurons,
        str(setup.block),
        DASH if candidate.density is None else f"{increase.mean:+.2%}",
        DASH if candidate.density is None else f"{increase.at_most:+.2%}",
        DASH if hits is None else f"{hits:.3f}",
        DASH if figures is None else f"{figures.bytes_per_token / 2**20:.4g}",
        DASH if figures is None else f"{figures.tokens_per_second:.4g}",
    ]


def _method(setup: Setup, density: float | None) -> str:
    if density is None:
        return "dense"
    return "dip" if setup.gamma is None else f"dip, γ = {setup.gamma:g}"


def _densities(candidate: Candidate, trials: Trials) -> tuple[str, str]:
    """The shares of input channels and of neurons that are kept, in the mean over the layers."""
    sites = trials.method(candidate.setup, candidate.density).sites(trials.task.shapes[0])
    if not sites:
        return "1", "1"
    means = (
        fmean(site.density for site in sites if site.name == name)
        for name in ("mlp.in", "mlp.hidden")
    )
    inputs, neurons = (f"{mean:.3f}" for mean in means)
    return inputs, neurons


def reason(choice: Choice, bound: float) -> str:
    """Why the chosen one: a sentence."""
    ratio = choice.chosen.speed / choice.dense.speed
    sparse = [candidate for candidate in choice.candidates[1:] if candidate.figures]
    if choice.chosen is not choice.dense:
        return (
            f"The fastest that keeps perplexity within {bound:.2%} of the dense model's: "
            f"{ratio:.3g} times its tokens/s in the same memory."
        )
    if not sparse:
        return f"Dense: no density that was tried keeps perplexity within {bound:.2%}."
    best = max(candidate.speed for candidate in sparse) / choice.dense.speed
    return (
        f"Dense: sparsity does not pay here, the fastest setting within the bound has {best:.3g} "
        "times its tokens/s."
    )


def summary(plan: Plan) -> dict[str, str]:
    """What is promised, for people."""
    expected = plan.expected
    hits = "" if expected.hit_rate is None else f", {expected.hit_rate:.1%} of them found in memory"
    read = expected.bytes_per_token
    own = takes_allocation(plan.chosen, plan.model)
    return {
        "method": plan.method + (OWN_ALLOCATION if own else ""),
        "tokens/s": f"{expected.tokens_per_second:.4g} on {plan.device} "
        f"(dense: {expected.dense_tokens_per_second:.4g})",
        "perplexity": f"{expected.perplexity:.2f}, {expected.increase:+.2%} over the dense "
        f"{expected.dense_perplexity:.2f}; {expected.increase_at_most:+.2%} at most",
        "memory": f"{size_text(expected.memory)} of the process",
        "MLP density": f"{expected.density:.3f}{hits}",
        "from disk": f"{size_text(read)} a token" if read else "nothing",
    }
