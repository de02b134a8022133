"""The `twotower-spec` command: thin commands over the library."""

from twotower_spec.cli.app import main

__all__ = ["main"]
