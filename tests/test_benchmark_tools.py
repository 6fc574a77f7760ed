"""What the benchmarks of whole decoders rest on: cgroups, medians, the random store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dipnet.store.checksum import record_checksums
from dipnet.store.index import RECORDS_NAME

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {"layers": 2, "hidden": 128, "ffn": 320, "heads": 2, "kv_heads": 1, "head_dim": 64}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the benchmarks' modules as the scripts beside it do."""
    for folder in (BENCHMARKS, BENCHMARKS / "peer"):
        monkeypatch.syspath_prepend(str(folder))
    return import_module


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 << 30), ("1.5MB", 1_500_000), ("7", 7)])
def test_sizes(tool: Any, text: str, size: int) -> None:
    assert tool("cgroup").parse_size(text) == size


@pytest.mark.parametrize(
    ("shares", "tries", "taken"),
    [([0.2, 0.01, 0.0], 2, (2, 0.01)), ([0.3, 0.05, 0.2, 0.4], 4, (2, 0.05))],
)
def test_what_others_disturb_is_measured_again(
    tool: Any,
    monkeypatch: pytest.MonkeyPatch,
    shares: list[float],
    tries: int,
    taken: tuple[int, float],
) -> None:
    timing, made = tool("timing"), []

    class Watch:
        def __init__(self) -> None:
            self.share = shares[len(made)]

    monkeypatch.setattr(timing, "Disturbance", Watch)
    monkeypatch.setattr(timing, "TRIES", 4)
    monkeypatch.setattr(timing, "PAUSE", 0)

    def measure() -> int:
        made.append(1)
        return len(made)

    assert timing.undisturbed(measure) == taken
    assert len(made) == tries


def test_ratio_is_of_paired_rounds(tool: Any) -> None:
    rounds = tool("timing").Rounds
    slow = rounds([{"median_seconds": 4.0}, {"median_seconds": 40.0}, {"median_seconds": 9.0}])
    fast = rounds([{"median_seconds": 2.0}, {"median_seconds": 10.0}, {"median_seconds": 3.0}])
    assert fast.ratio(slow) == 3.0
    assert rounds([], "killed").ratio(slow) != rounds([], "killed").ratio(slow)  # not a number


def test_json_line_has_no_nan(tool: Any) -> None:
    result = {"a": [1, float("nan")], "b": {"c": "x"}, "d": None}
    line = tool("timing").json_line(result)
    assert json.loads(line, parse_constant=pytest.fail) == {
        "a": [1, None],
        "b": {"c": "x"},
        "d": None,
    }


@pytest.mark.parametrize(
    ("points", "loss", "found"),
    [
        ([(0.0, 0.0), (0.4, 0.02), (0.2, 0.0)], 0.01, 0.3),
        ([(0.0, 0.0), (0.2, 0.03), (0.3, 0.01), (0.5, 0.05)], 0.01, 0.3),
        ([(-0.1, 0.0), (0.1, 0.04)], 0.01, -0.05),
        ([(0.1, 0.005), (0.2, 0.01)], 0.01, 0.2),
        ([(0.1, 0.02), (0.2, 0.03)], 0.01, None),
    ],
)
def test_the_highest_sparsity_within_a_loss(
    tool: Any, points: list[tuple[float, float]], loss: float, found: float | None
) -> None:
    assert tool("deja_vu_report").highest_sparsity(points, loss) == pytest.approx(found)


@pytest.fixture
def cgroup(tool: Any) -> Any:
    """The module, where this system lets us make a memory cgroup."""
    module = tool("cgroup")
    try:
        with module.memory_group(1 << 28):
            pass
    except (module.CgroupError, OSError) as error:
        pytest.skip(f"no memory cgroups here: {error}")
    return module


def test_cgroup_reports_and_limits(cgroup: Any) -> None:
    code = "x = b'1' * int(__import__('sys').argv[1]); print(len(x))"
    small, large = 30_000_000, 200_000_000
    fits = cgroup.run([sys.executable, "-c", code, str(small)], 100 << 20, timeout=60)
    assert (fits.returncode, fits.oom_kills, fits.stdout) == (0, 0, f"{small}\n")
    assert small < fits.peak < 100 << 20
    killed = cgroup.run([sys.executable, "-c", code, str(large)], 100 << 20, timeout=60)
    assert killed.oom_kills == 1
    assert killed.returncode < 0


def test_cgroup_ends_what_takes_too_long(cgroup: Any) -> None:
    done = cgroup.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 100 << 20, timeout=0.5)
    assert (done.timed_out, done.stdout) == (True, "begun\n")


@pytest.fixture
def gpu_cuts(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, for a GPU of 132 multiprocessors."""
    pytest.importorskip("triton", reason="the cuts are of Triton's kernels, too")
    module = tool("gpu_cuts")
    monkeypatch.setattr(module, "multiprocessors", lambda: 132)
    return module


def cuts(kernel: Any) -> Iterator[tuple[Any, Any]]:
    """Products and their cuts: those of the table, and those that are tried."""
    assert set(kernel.table) == set(kernel.units)
    for product in kernel.units:
        tried = [*kernel.candidates(product)]
        assert len(set(tried)) == len(tried) > 20
        for tile in (kernel.table[product], *tried):
            yield product, tile


def test_cuts_of_columns_can_be_launched(gpu_cuts: Any) -> None:
    for product, tile in cuts(gpu_cuts.KERNELS["columns"]):
        outputs = tile.words * 32 // product.bits
        sides = tile.threads // max(32, tile.lanes)
        shared = sides * tile.lanes * outputs + tile.lanes * outputs + 16 * product.matrices
        assert tile.parts <= 16
        assert tile.lanes % product.matrices == 0
        assert tile.threads % max(32, tile.lanes) == 0
        assert 4 * shared <= 48 << 10
        assert tile.threads * tile.resident <= 2048
        assert tile.reads * tile.words + outputs < 65536 // (tile.threads * tile.resident)


def test_cuts_of_rows_can_be_launched(gpu_cuts: Any) -> None:
    for product, tile in cuts(gpu_cuts.KERNELS["rows"]):
        at_once = tile.units * tile.reads * product.matrices  # what x takes may be read later
        assert tile.threads % max(32, tile.lanes) == 0
        assert tile.threads * tile.resident <= 2048
        assert 4 * at_once < 65536 // (tile.threads * tile.resident)


def test_cuts_are_timed_on_whole_inputs(
    gpu_cuts: Any, tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows x is as long as a unit, of columns it has a number for each."""
    tuner, product = tool("tune_gpu_kernels"), gpu_cuts.Product(1, 16, 64, 8)
    given: list[tuple[int, ...]] = []

    def run(x: Tensor, index: Tensor, weights: Any, tile: Any) -> Tensor:
        given.append((x.shape[1], int(index.max()), *weights[0].data.shape))
        return x

    monkeypatch.setattr(tuner, "DEVICE", "cpu")
    monkeypatch.setattr(tuner, "in_turn", lambda make: [make()])
    monkeypatch.setattr(tuner, "graph_us", lambda run, launches: bool(len(run(0))) * 1.0)
    monkeypatch.setattr(
        tuner, "lists", lambda units, kept: [torch.arange(units - kept, units)] * tuner.LISTS
    )
    for name, inputs in (("rows", 64), ("columns", 24)):
        kernel = replace(
            gpu_cuts.KERNELS[name], run=run, units={product: 24}, candidates=lambda _: ["a cut"]
        )
        assert tuner.tuned(kernel, product, 1) == [(1.0, "a cut")]
        assert set(given) == {(inputs, 23, 24, 64)}
        given.clear()


def gpu_figures(gpu: Any, speedup: float) -> dict[str, dict[str, Any]]:
    """As the benchmarks print them, every product so many times as fast as cuBLAS."""
    names = [
        f"{name}, {inputs} to {outputs}, {density}"
        for name in ("columns", "rows")
        for inputs, outputs in gpu.TEAL
        for density in gpu.DENSITIES
    ]
    rows = [{"what": name, "speedup": speedup} for name in (*names, gpu.MLP)]
    rows += [{"what": f"top-k indices, n = {n}", "speedup": 9, "us": n / 9000} for n in (9, 27000)]
    plain = {"batch": 1, "weights": "bf16"}
    times = {"dense": 4.0, "sparse": 2.0, "hf-eager": 40.0, "hf-compiled": 8.0}
    decoded = [{"how": how, "median_seconds": time} | plain for how, time in times.items()]
    decoded.append({"how": "sparse", "median_seconds": 1.0} | plain | {"weights": "int4"})
    models = {model: {"rows": decoded} for model in (gpu.LLAMA, gpu.OPT)}
    return {"kernels": {"rows": rows}, "quality": {"largest_difference": 5e-4}, **models}


def test_what_is_wanted_of_a_gpu(tool: Any) -> None:
    gpu = tool("gpu")
    figures = gpu_figures(gpu, 9.0)
    assert all(row["met"] for row in gpu.summary(figures))
    measured = {row["what"]: row["measured"] for row in gpu.summary(figures)}
    assert measured["exact top-k, slowest, us"] == 3
    assert measured["Llama-3-8B, DIP, x HF eager"] == 20
    assert measured["perplexity, largest difference, %"] == pytest.approx(0.05)
    figures["kernels"]["rows"][0]["speedup"] = 1.6  # one product at one density
    unmet = [row["what"] for row in gpu.summary(figures) if not row["met"]]
    assert unmet == ["products of small shapes, 50%, x cuBLAS"]
    figures["quality"]["largest_difference"] = 2e-3
    assert sum(not row["met"] for row in gpu.summary(figures)) == 2


def test_random_store(tool: Any, tmp_path: Path) -> None:
    make_store, shapes = tool("make_store"), tool("shapes")
    sizes = shapes.Shapes(**TINY, vocabulary=288, context=64)
    indices = [make_store.make(tmp_path / name, sizes, 8, seed=1) for name in ("a", "b")]
    stored = [(tmp_path / name / RECORDS_NAME).read_bytes() for name in ("a", "b")]
    assert indices[0] == indices[1]
    assert stored[0] == stored[1]
    content = np.frombuffer(stored[0], np.uint8)
    for number, group in enumerate(indices[0].groups):
        records = content[group.offset : group.end].reshape(group.units, -1)
        sums = record_checksums(records, group=number, first_unit=0)
        assert np.array_equal(records[:, -8:].copy().view("<u8")[:, 0], sums)
