"""The options that record a trace: what `run` and `eval` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.options import FLAG
from dipnet.errors import InputError
from dipnet.files import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dipnet.cli.methods import MethodRequest
    from dipnet.eval.sweep import Job

Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Record which units each token wants, for dipnet simulate (docs/trace-format.md)",
        show_default=False,
    ),
]
TraceScores = Annotated[
    bool,
    typer.Option(
        "--trace-scores",
        metavar=FLAG,
        help="Record their scores, too: sixteen times the size",
    ),
]


@dataclass(frozen=True)
class Tracing:
    """What the options say of a trace. Raises InputError when it could not be written."""

    file: Path | None
    scores: bool = False

    def __post_init__(self) -> None:
        if self.file is not None:
            check_writable(self.file)
        elif self.scores:
            raise InputError("--trace-scores goes with --trace FILE: give that")

    def check(self, requests: Sequence[MethodRequest], densities: Sequence[float]) -> None:
        """Raise InputError when an evaluation would record more or less than one method."""
        sparse = [request for request in requests if request.name != "dense"]
        count = sum(len(densities) if request.takes_density else 1 for request in sparse)
        if self.file is not None and count != 1:
            raise InputError(
                f"--trace records one method at one density, and here are {count}: give one "
                "--method (other than dense) and one --density"
            )

    def jobs(self, jobs: Sequence[Job], name: str) -> Sequence[Job]:
        """The jobs of an evaluation, the one after the dense model's as it is to be recorded."""
        if self.file is None:
            return jobs
        dense, job = jobs
        return [dense, replace(job, recording=partial(self.record, name=name))]

    @contextmanager
    def record(self, model: PreTrainedModel, name: str) -> Iterator[None]:
        """Record what the model does inside the ``with`` block, if a trace was asked for."""
        from dipnet.models.recording import record

        if self.file is None:
            yield
            return
        with record(model, self.file, scores=self.scores, name=name):
            yield
