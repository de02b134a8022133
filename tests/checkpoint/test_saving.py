"""Files that saving leaves, finished or interrupted. A limit on file sizes stands for a full disk and for a kill."""

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.files import copy_checkpoint, file_bytes, read_index, stored_bytes
from tests.support.builders import tiny_config
from tests.support.golden_files import NAMES, checkpoint
from twotower_spec import CheckpointError, TwoTowerModel
from twotower_spec.checkpoint.saving import DEFAULT_SHARD_BYTES


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Limits file sizes, so that writing more fails as on a full disk, also for root."""
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
@pytest.mark.parametrize("max_shard_bytes", [600_000, DEFAULT_SHARD_BYTES])
def test_saved_files_hold_every_bit_and_dtype_that_was_loaded(
    name: str, dtype: str | None, max_shard_bytes: int, tmp_path: Path
) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint(name), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert stored_bytes(tmp_path) == stored_bytes(checkpoint(name))
    again = TwoTowerModel.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == model.config
    pairs = zip(again.checkpoint_tensors(), model.checkpoint_tensors(), strict=True)
    assert [a for (a, one), (b, other) in pairs if a != b or not torch.equal(one, other)] == []


def test_new_model_is_saved_with_its_dtype(tmp_path: Path) -> None:
    model = TwoTowerModel.from_config(tiny_config(), dtype="bfloat16", seed=17)
    model.save_pretrained(tmp_path)
    again = TwoTowerModel.from_pretrained(tmp_path)
    assert (again.dtype, again.config.torch_dtype) == (torch.bfloat16, "bfloat16")
    pairs = zip(again.checkpoint_tensors(), model.checkpoint_tensors(), strict=True)
    assert [a for (a, one), (_, other) in pairs if not torch.equal(one, other)] == []


def test_shards_keep_to_their_size_and_the_index_places_every_tensor(tmp_path: Path) -> None:
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path, max_shard_bytes=500_000)
    shards = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(shards) == 5
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= 500_000 for tensors in shards.values())
    index = read_index(tmp_path)
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


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


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a real file system of the given size."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting a small file system is not possible here: {error}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def tensor_bytes(model: TwoTowerModel) -> int:
    return sum(tensor.nbytes for _, tensor in model.checkpoint_tensors())


def test_disk_that_is_seen_to_be_too_small_is_refused_with_what_is_needed(mounted: Callable[[int], Path]) -> None:
    disk, model = mounted(1 << 20), changed_model()
    with pytest.raises(CheckpointError, match=f"{tensor_bytes(model)} bytes are needed and [0-9]+ are free"):
        model.save_pretrained(disk / "new")
    assert file_bytes(disk) == {}


def test_disk_that_fills_while_it_is_written_is_left_empty(mounted: Callable[[int], Path]) -> None:
    # Room for the tensors, but not for the header of the file as well.
    model = changed_model()
    disk = mounted(tensor_bytes(model) + 2 * 4096)
    with pytest.raises(CheckpointError, match=r"could not be saved in .*free space"):
        model.save_pretrained(disk / "new")
    assert file_bytes(disk) == {}


def test_full_disk_leaves_an_existing_checkpoint_as_it_was(mounted: Callable[[int], Path]) -> None:
    directory, model = copy_checkpoint("T1", mounted(4 << 20)), changed_model()
    before = file_bytes(directory)
    with pytest.raises(CheckpointError, match="could not be saved"):
        model.save_pretrained(directory)
    assert file_bytes(directory) == before
    TwoTowerModel.from_pretrained(directory)


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


@pytest.mark.parametrize("existing", [True, False])
def test_kill_in_the_middle_of_a_shard_leaves_what_was_there_as_it_was(existing: bool, tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path) if existing else tmp_path / "new"
    before = file_bytes(directory)
    # The system kills a process that writes beyond its limit: here in the second shard, after the first is complete.
    code = """
import resource, signal, sys
from twotower_spec import TwoTowerModel
model = TwoTowerModel.from_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (502_000, 502_000))
model.save_pretrained(sys.argv[2], max_shard_bytes=500_000)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(checkpoint("T1")), str(directory)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    after = file_bytes(directory)
    drafts = {name for name in after if name.startswith(".saving-")}
    assert len(drafts) == 2
    assert {name: content for name, content in after.items() if name not in drafts} == before
