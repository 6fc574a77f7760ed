"""The pictures of a simulation: which points they show, and which of them nothing beats."""

from __future__ import annotations

from dipnet.eval.simulate_plot import Panel, Point, draw, front, memory_panels, throughput_panels
from dipnet.sim.device import load_device
from dipnet.sim.scenario import Figures, Scenario
from dipnet.sim.sweep import DENSE, Asked, Outcome

PHONE = load_device("phone")
MIB = 2**20


def row(
    label: str,
    memory: int,
    speed: float,
    perplexity: float,
    policy: str = "lfu",
    gamma: float | None = None,
    read: float = 1.0,
) -> Outcome:
    figures = Figures(0, 0, 0.5, 0.5, {}, read, speed, 10)
    scenario = Scenario(memory * MIB, policy, "int4", 8)
    return Outcome(Asked(label, 0.5, gamma), scenario, PHONE, figures, perplexity)


def places(points: list[Point]) -> list[tuple[str, float, float]]:
    return [(point.line, point.x, point.perplexity) for point in points]


def test_a_panel_for_each_memory_with_a_line_for_each_method() -> None:
    rows = [row(DENSE, m, 1, 30) for m in (10, 20)] + [
        row("dip", m, 2, 33, gamma=gamma) for m in (10, 20) for gamma in (None, 0.5)
    ]
    first, second = throughput_panels(rows)
    assert (first.title, second.title) == ("10 MiB, phone, 1 GB/s", "20 MiB, phone, 1 GB/s")
    assert [point.line for point in first.points] == [DENSE, "dip", "dip, γ = 0.5"]


def test_policies_are_named_where_there_are_several() -> None:
    rows = [row(DENSE, 10, 1, 30), row("dip", 10, 2, 33), row("dip", 10, 3, 33, "belady")]
    (panel,) = throughput_panels(rows)
    assert [point.line for point in panel.points] == [DENSE, "dip, lfu", "dip, belady"]
    assert [point.bound for point in panel.points] == [False, False, True]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        Point("a", 1, 30, bound=False),
        Point("a", 2, 31, bound=False),
        Point("b", 2, 32, bound=False),  # as fast as the one before, and worse
        Point("b", 1.5, 31, bound=False),  # as good as the second, and slower
        Point("c", 9, 29, bound=True),
    ]
    faster = front(Panel("", "", points, more=True))
    assert places(faster) == [("a", 1, 30), ("a", 2, 31)]
    smaller = front(Panel("", "", points, more=False))
    assert places(smaller) == [("a", 1, 30)]


def test_equal_points_share_the_front() -> None:
    points = [Point("a", 1, 30, bound=False), Point("b", 1, 30, bound=False)]
    assert front(Panel("", "", points, more=True)) == points


def test_over_memories_methods_keep_up_with_dense_streaming() -> None:
    rows = [
        row(DENSE, 10, 1, 30),
        row(DENSE, 20, 5, 30),
        row(DENSE, 30, 50, 30, read=0),  # all in memory: no streaming
        row("dip", 10, 4, 33),
        row("dip", 10, 6, 35),
        row("dip", 10, 7, 36),
        row("dip", 20, 8, 32),
    ]
    (panel,) = memory_panels(rows)
    assert panel.title.startswith("at least 5 tokens/s")
    assert panel.title.endswith("dense with 20 MiB")
    expected = [(DENSE, 20, 30), (DENSE, 30, 30), ("dip", 10, 35), ("dip", 20, 32)]
    assert sorted(places(list(panel.points))) == sorted(expected)
    assert places(front(panel)) == [(DENSE, 20, 30), ("dip", 10, 35)]


def test_one_memory_is_no_axis() -> None:
    assert memory_panels([row(DENSE, 10, 1, 30), row("dip", 10, 2, 33)]) == []


def test_the_picture_is_a_png_and_always_the_same() -> None:
    rows = [row(DENSE, m, m, 30) for m in (10, 20)] + [row("dip", m, 2 * m, 33) for m in (10, 20)]
    assert draw(rows).startswith(b"\x89PNG\r\n\x1a\n")
    assert draw(rows) == draw(rows)
