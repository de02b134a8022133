"""Processes of Python that are told what to do over a connection."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from twotower_bench.child_process import ChildProcess


class ConnectedProcess(ChildProcess):
    """Runs a module of ours, which finds its end of the connection with `own_end`."""

    def __init__(self, title: str, module: str, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts the process and returns at once; arguments as of `ChildProcess`."""
        self.connection, theirs = Pipe()
        with theirs:
            # -P: nothing is imported from the working directory.
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
            super().__init__(title, command, folder, environment, [theirs.fileno()])


def own_end(descriptor: int) -> Connection:
    """Our end of a connection that whoever started this process made."""
    os.set_inheritable(descriptor, False)  # the other end must see it close when this process ends
    return Connection(descriptor)
