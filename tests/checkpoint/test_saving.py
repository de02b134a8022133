"""What saving leaves behind, whole or interrupted. A full disk and a kill are made by limiting the size of files."""

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoint.files import copy_checkpoint, file_bytes, read_index, stored_bytes
from tests.golden_files import checkpoint
from twotower_spec import CheckpointError, TwoTowerModel


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Writing further fails as it does on a full disk, also for root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def changed_model() -> TwoTowerModel:
    """T1 with other weights than its files have."""
    model = TwoTowerModel.from_pretrained(checkpoint("T1"))
    for _, tensor in model.checkpoint_tensors():
        tensor.data.add_(1)
    return model


def test_saving_over_the_directory_it_was_loaded_from_keeps_every_bit(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    TwoTowerModel.from_pretrained(directory, dtype="float32").save_pretrained(directory, max_shard_bytes=700_000)
    assert stored_bytes(directory) == stored_bytes(checkpoint("T2"))


def test_fewer_shards_than_before_leave_no_stale_shard(tmp_path: Path) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint("T1"))
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    before = {path.name for path in tmp_path.glob("*.safetensors")}
    model.save_pretrained(tmp_path, max_shard_bytes=1_500_000)
    after = {path.name for path in tmp_path.glob("*.safetensors")}
    assert after == set(read_index(tmp_path)["weight_map"].values())
    assert before.isdisjoint(after)


def test_shards_replace_a_single_file(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    TwoTowerModel.from_pretrained(directory).save_pretrained(directory, max_shard_bytes=1_000_000)
    assert not (directory / "model.safetensors").exists()
    assert stored_bytes(directory) == stored_bytes(checkpoint("T1"))


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    others = {"tokenizer.json": b"{}", "notes.txt": b"mine", "adapter.safetensors": b"not ours"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in others} == others


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path, max_shard_bytes=1)
    weight_map = read_index(tmp_path)["weight_map"]
    assert len(set(weight_map.values())) == len(weight_map)
    assert stored_bytes(tmp_path) == stored_bytes(checkpoint("T1"))


def test_files_get_the_permissions_that_new_files_have(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path, max_shard_bytes=1_000_000)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_path_that_is_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_directory_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"could not be saved in /proc/nowhere"):
        TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained("/proc/nowhere")


@pytest.mark.parametrize("limit", [0, 17, 502_000])
def test_write_that_fails_leaves_nothing_in_a_new_directory(limit: int, tmp_path: Path) -> None:
    model = changed_model()
    with (
        files_no_larger_than(limit),
        pytest.raises(CheckpointError, match=r"could not be saved in .*free space"),
    ):
        model.save_pretrained(tmp_path / "new", max_shard_bytes=500_000)
    assert file_bytes(tmp_path) == {}


@pytest.mark.parametrize("name", ["T1", "T2"])
def test_write_that_fails_leaves_an_existing_checkpoint_as_it_was(name: str, tmp_path: Path) -> None:
    directory = copy_checkpoint(name, tmp_path)
    before, model = file_bytes(directory), changed_model()
    with files_no_larger_than(502_000), pytest.raises(CheckpointError):
        model.save_pretrained(directory, max_shard_bytes=500_000)
    assert file_bytes(directory) == before
    TwoTowerModel.from_pretrained(directory)


def test_kill_in_the_middle_of_a_shard_leaves_an_existing_checkpoint_as_it_was(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    before = file_bytes(directory)
    # The system kills a process that writes past its limit: here in the second shard, when the first is whole.
    code = """
import resource, signal, sys
from twotower_spec import TwoTowerModel
model = TwoTowerModel.from_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (502_000, 502_000))
model.save_pretrained(sys.argv[1], max_shard_bytes=500_000)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run([sys.executable, "-c", code, str(directory)], env=environment, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    after = file_bytes(directory)
    drafts = {name for name in after if name.startswith(".saving-")}
    assert len(drafts) == 2
    assert {name: content for name, content in after.items() if name not in drafts} == before
    TwoTowerModel.from_pretrained(directory)
