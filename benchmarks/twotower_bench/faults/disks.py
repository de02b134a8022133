"""Full and read-only disks under everything of ours that writes: one sentence, and no half-written file."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from twotower_bench.faults.cells import REMEDY
from twotower_bench.faults.trials import Trial
from twotower_bench.serving_profile import ServingProfile
from twotower_spec.cli.output import ResumableOutput
from twotower_spec.demo.trio import trio_path
from twotower_spec.errors import TwoTowerError, first_line
from twotower_spec.files import write_atomically
from twotower_spec.model import TwoTowerModel
from vllm_twotower.metrics import DrafterStats, publish
from vllm_twotower.stats_folder import STATS_FOLDER_VARIABLE, SUFFIX

# Of a disk; more than the first rows and less than anything that is then written takes.
ROOM_BYTES = 32 << 10
LONG_TEXT = "x" * (64 << 10)
ONE_SENTENCE = "one sentence with a remedy, files as they were"

Writer = Callable[[Path], None]


class NoSuchDisk(Exception):
    """This machine does not let us make the disk; the text says why."""


@contextmanager
def full_disk() -> Iterator[Path]:
    """A folder on a disk with hardly any room; a limit on the length of files where none can be mounted."""
    with TemporaryDirectory(prefix="full-") as name, ExitStack() as stack:
        folder = Path(name)
        if not stack.enter_context(mounted_disk(folder, f"size={ROOM_BYTES}")):
            stack.enter_context(_short_files())
        yield folder


@contextmanager
def read_only_disk() -> Iterator[Path]:
    """A folder that nothing can be written to.

    Raises:
        NoSuchDisk: none can be mounted, and permissions do not bind this user.
    """
    with TemporaryDirectory(prefix="read-only-") as name, ExitStack() as stack:
        folder = Path(name)
        if stack.enter_context(mounted_disk(folder, "ro")):
            yield folder
        elif os.geteuid():
            folder.chmod(0o500)
            yield folder
            folder.chmod(0o700)
        else:
            raise NoSuchDisk("no disk can be mounted here, and permissions do not bind root")


@contextmanager
def mounted_disk(folder: Path, options: str) -> Iterator[bool]:
    """Mounts a disk in memory; False where that is not allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield not done.returncode
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def _short_files() -> Iterator[None]:
    """Lets this process write no file that is longer than the disk would have room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _rows(folder: Path) -> None:
    with ResumableOutput(folder / "rows.jsonl", "run") as output:
        output.append([{"index": 0}])
        output.append([{"index": 1, "text": LONG_TEXT}])


def _checkpoint(folder: Path) -> None:
    TwoTowerModel.from_pretrained(trio_path("twotower")).save_pretrained(folder / "saved")


def _profile(folder: Path) -> None:
    ServingProfile(LONG_TEXT).save(folder / "profile.json")


def _whole_file(folder: Path) -> None:
    write_atomically(folder / "figures.json", LONG_TEXT)


# What is written by which command is in the names; all tables and cards of the others go through `write_atomically`.
WRITERS: Mapping[str, Writer] = {
    "rows of bench and generate (ResumableOutput)": _rows,
    "save_pretrained": _checkpoint,
    "profile of bench sweep": _profile,
    "reports, figures, tuned tables, model cards (write_atomically)": _whole_file,
}
DISKS = {"full": full_disk, "read-only": read_only_disk}


def disk_trials() -> Iterator[Trial]:
    """Tries every writer on every disk."""
    for disk in DISKS:
        for name, write in WRITERS.items():
            yield try_writer(name, write, disk)
        yield try_stats(disk)


def try_stats(disk: str) -> Trial:
    """Tries to keep the numbers of a drafter on a disk."""
    what, must = f"{disk} disk: numbers of the drafter (stats folder)", "served on, one sentence in the log"
    try:
        with DISKS[disk]() as folder:
            return _judged(what, must, folder, [], stats_on(folder))
    except NoSuchDisk as error:
        return Trial(what, must, reason=str(error))


def try_writer(name: str, write: Writer, disk: str) -> Trial:
    """Tries a writer on a disk."""
    what = f"{disk} disk: {name}"
    try:
        with DISKS[disk]() as folder:
            said: list[str] = []
            with suppress(OSError):
                (folder / "profile.json").write_text("{}")  # which is to stay
            before = _files(folder)
            try:
                write(folder)
            except TwoTowerError as error:
                said.append(str(error))
            except Exception as error:
                return Trial(what, ONE_SENTENCE, faults=(f"{type(error).__name__}: {first_line(error)}",))
            return _judged(what, ONE_SENTENCE, folder, before, said)
    except NoSuchDisk as error:
        return Trial(what, ONE_SENTENCE, reason=str(error))


def stats_on(folder: Path) -> list[str]:
    """Makes the folder of a server's numbers, and the numbers of an engine, on a disk; what is logged of it."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.twotower.metrics")
    logger.addHandler(listener)
    before = os.environ.pop(STATS_FOLDER_VARIABLE, None)
    try:
        with suppress(OSError):
            (folder / "filling").write_bytes(b"x" * 2 * ROOM_BYTES)
        with patch.object(tempfile, "tempdir", str(folder)):
            publish(starts_engines=True)
            DrafterStats(folder / f"0{SUFFIX}").add("rounds", 1)
    finally:
        logger.removeHandler(listener)
        os.environ.pop(STATS_FOLDER_VARIABLE, None)
        if before is not None:
            os.environ[STATS_FOLDER_VARIABLE] = before
    with suppress(OSError):
        (folder / "filling").unlink()
    return list(dict.fromkeys(said))


def _files(folder: Path) -> list[tuple[str, str]]:
    """Files of a folder that are no whole rows, and what is in them."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_text(errors="replace")
            if path.suffix == ".jsonl" and all(map(_is_row, text.splitlines())):
                continue
            found.append((str(path.relative_to(folder)), text))
    return found


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _judged(what: str, must: str, folder: Path, before: list[tuple[str, str]], said: list[str]) -> Trial:
    faults = []
    if len(said) != 1:
        faults.append(f"{len(said)} sentences")
    faults += [f"no remedy in: {one}" for one in said if REMEDY not in one]
    if (now := _files(folder)) != before:
        faults.append(f"files {[name for name, _ in now]} instead of {[name for name, _ in before]}")
    seen = "; ".join(said).replace(str(folder), "FOLDER")
    return Trial(what, must, seen, tuple(faults))
