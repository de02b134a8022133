"""The folder of the drafter's numbers is private, and what a killed process leaves is gone at the next start."""

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vllm_twotower.stats_folder import PREFIX, StatsFolder, remove_left_over, stats_files

PUBLISH = """
import sys
from vllm_twotower.stats_folder import StatsFolder
folder = StatsFolder()
(folder.path / "0.stats").write_text("numbers")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def publisher(temporary: Path) -> "subprocess.Popen[str]":
    """A process that has a folder and waits for the end of its input."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISH], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith(str(temporary))
    return process


def test_nobody_else_enters_the_folder(temporary: Path) -> None:
    folder = StatsFolder()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()
    assert not list(temporary.iterdir())


def test_a_killed_process_leaves_a_folder_that_the_next_start_removes(temporary: Path) -> None:
    with publisher(temporary) as killed, publisher(temporary) as running:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(temporary.iterdir())) == 2
        folder = StatsFolder()
        (other,) = (path for path in temporary.iterdir() if path != folder.path)
        assert [engine for engine, _ in stats_files(other)] == ["0"]  # that of the process that still runs
        running.communicate("")
    assert list(temporary.iterdir()) == [folder.path]


ENGINE = """
import os, subprocess, sys, time
from vllm_twotower.stats_folder import STATS_FOLDER_VARIABLE, StatsFolder, end_with_server
if len(sys.argv) == 1:
    os.environ[STATS_FOLDER_VARIABLE] = str(StatsFolder().path)
    end_with_server()  # it is the server itself
    subprocess.Popen([sys.executable, "-c", ENGINE, "engine"])
    time.sleep(600)
end_with_server()
print("engine", os.getpid(), flush=True)
time.sleep(600)
"""


def test_an_engine_ends_with_its_killed_server(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"ENGINE = {ENGINE!r}\nexec(ENGINE)"
    server = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdout is not None
        engine = os.pidfd_open(int(server.stdout.readline().split()[1]))
        server.kill()
        waiting = select.poll()
        waiting.register(engine, select.POLLIN)
        assert waiting.poll(60_000)
    assert not list(temporary.iterdir())


def test_a_folder_that_cannot_be_locked_is_not_left_behind(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(file: object, how: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fcntl.flock", lock)
    with pytest.raises(OSError, match="No space left"):
        StatsFolder()
    assert not list(temporary.iterdir())


def test_what_only_looks_like_such_a_folder_stays(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}beginning").mkdir()
    remove_left_over()
    assert len(list(temporary.iterdir())) == 4 and (elsewhere / "lock").exists()
