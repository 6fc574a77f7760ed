"""The sizes of the benchmark models: Phi-3-Medium's by default. Needs nothing but Python.

make_gguf.py and make_store.py share them, each run by a Python that has only the one library.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Shapes:
    """A decoder with grouped-query attention and a gated MLP, without biases."""

    layers: int = 40
    hidden: int = 5120
    ffn: int = 17920
    heads: int = 40
    kv_heads: int = 10
    head_dim: int = 128
    vocabulary: int = 32064
    context: int = 4096

    @property
    def q_out(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_out(self) -> int:
        return self.kv_heads * self.head_dim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option a size (`--layers 40`, `--kv-heads 10`, ...) and `--seed`."""
    for field in fields(Shapes):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, metavar="N")
    parser.add_argument("--seed", type=int, default=0)


def from_arguments(args: argparse.Namespace) -> Shapes:
    """The sizes that the options ask for."""
    return Shapes(**{field.name: getattr(args, field.name) for field in fields(Shapes)})
