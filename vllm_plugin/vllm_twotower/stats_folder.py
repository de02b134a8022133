"""The private folder where the drafters of a server write their numbers, and the processes that serve them read.

The process that starts the engines makes it. Its name is in the environment, which vLLM's processes inherit: in vLLM's
configuration it would change the key of its compilation cache with every start.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import select
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from threading import Thread

STATS_FOLDER_VARIABLE = "TWOTOWER_STATS_FOLDER"
PREFIX = "twotower-stats-"
SUFFIX = ".stats"
# Held by the process that made the folder and those forked from it, until the last of them has ended, however it ended.
LOCK = "lock"


class StatsFolder:
    """A folder that only its owner enters, so that nobody can put a link in it; removed at the end of the process."""

    def __init__(self) -> None:
        """Makes and locks it, and removes what killed processes have left.

        Raises:
            OSError: the folder for temporary files cannot be written.
        """
        remove_left_over()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._process = os.getpid()
        try:
            self._lock = self._locked()
        except OSError:
            self.remove()
            raise
        atexit.register(self.remove)

    def _locked(self) -> FileIO:
        """Makes the lock, which appears when it is held; it stays open."""
        before = self.path / "not locked yet"
        lock = before.open("wb", buffering=0)
        try:
            lock.write(str(self._process).encode())
            fcntl.flock(lock, fcntl.LOCK_EX)
            before.rename(self.path / LOCK)
        except OSError:
            lock.close()
            raise
        return lock

    def remove(self) -> None:
        """Removes it with what is in it, unless another process has made it."""
        if os.getpid() == self._process:
            shutil.rmtree(self.path, ignore_errors=True)


def inherited() -> Path | None:
    """The folder of the process that started this one or one above it; None where numbers are not asked for."""
    name = os.environ.get(STATS_FOLDER_VARIABLE)
    return Path(name) if name else None


def stats_path(engine: int) -> Path | None:
    """Where the worker of a data-parallel rank writes; None if nobody reads."""
    folder = inherited()
    return None if folder is None else folder / f"{engine}{SUFFIX}"


def stats_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields data-parallel rank and file of every drafter."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        # A file is empty for a moment when it is made, and gone when its server ends.
        with suppress(OSError):
            if path.stat().st_size:
                yield path.stem, path


def end_with_server() -> None:
    """Ends this process, and removes the folder, when the one that made it has ended, however it did; never raises.

    A killed server leaves its engines waiting for requests, with all their memory. Where there are no such handles for
    processes (they are Linux's) nothing happens.
    """
    folder = inherited()
    # A RuntimeError where no further thread may be started.
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        if folder is not None and (server := int((folder / LOCK).read_text())) != os.getpid():
            handle = os.pidfd_open(server)
            Thread(target=_end_after, args=(handle, folder), name="twotower-server-watch", daemon=True).start()


def _end_after(server: int, folder: Path) -> None:
    """Waits for a process, removes the folder that it had no time to remove, and asks this one to end as vLLM does."""
    waiting = select.poll()
    waiting.register(server, select.POLLIN)
    waiting.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def remove_left_over() -> None:
    """Removes folders of processes that were killed; others' and what only looks like one stay."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_left_over(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left_over(path: Path) -> bool:
    """Whether a folder is ours and its lock is not held.

    Raises:
        OSError: it has no lock: it is being made, or is no folder of ours.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    with (path / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
