"""The command line. Nothing heavy is imported before a command runs: ``--help`` answers at once."""

from dipnet.cli.app import main

__all__ = ["main"]
