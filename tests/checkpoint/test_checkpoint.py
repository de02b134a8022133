"""Loading and saving real files: exact, complete in what it reports, and never half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden_files import NAMES, checkpoint
from tests.support.builders import tiny_config
from twotower_spec import ArgumentError, CheckpointError, TwoTowerModel

SHARD = "model-00002-of-00003.safetensors"


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as they are in its files."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_files(one: Path, other: Path) -> None:
    first, second = stored(one), stored(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sharded fixture, to be damaged."""
    return Path(shutil.copytree(checkpoint("T2"), tmp_path / "T2"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_load_save_load_keeps_every_bit_and_dtype(name: str, dtype: str | None, tmp_path: Path) -> None:
    TwoTowerModel.from_pretrained(checkpoint(name), dtype=dtype).save_pretrained(tmp_path / "saved")
    assert_same_files(checkpoint(name), tmp_path / "saved")
    again = TwoTowerModel.from_pretrained(tmp_path / "saved")
    original = TwoTowerModel.from_pretrained(checkpoint(name))
    assert again.config == original.config
    for (one, a), (other, b) in zip(again.checkpoint_tensors(), original.checkpoint_tensors(), strict=True):
        assert one == other
        assert torch.equal(a, b)


def test_weights_load_in_the_dtype_they_are_stored_in() -> None:
    model = TwoTowerModel.from_pretrained(checkpoint("T2"))
    assert model.dtype == torch.bfloat16
    tensors = dict(model.checkpoint_tensors())
    assert tensors["context_tower.layers.0.mixer.A_log"].dtype == torch.float32


def test_large_checkpoint_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(tmp_path, max_shard_bytes=500_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 3
    assert all(file.stat().st_size < 600_000 for file in tmp_path.glob("*.safetensors"))
    assert_same_files(checkpoint("T1"), tmp_path)


def test_saving_over_a_sharded_checkpoint_leaves_one_checkpoint(copy: Path) -> None:
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(copy)
    assert sorted(p.name for p in copy.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same_files(checkpoint("T1"), copy)


def test_new_model_is_saved_with_its_dtype(tmp_path: Path) -> None:
    TwoTowerModel.from_config(tiny_config(), dtype="bfloat16").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert TwoTowerModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_context_tower_alone_generates_and_says_what_it_lacks(tmp_path: Path) -> None:
    both = TwoTowerModel.from_pretrained(checkpoint("T1"))
    model = TwoTowerModel.from_pretrained(checkpoint("T1"), towers="context")
    assert not model.has_denoiser
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(p.numel() for p in both.parameters())
    assert model.generate_ar([5, 6], max_new_tokens=4).token_ids == both.generate_ar([5, 6], max_new_tokens=4).token_ids
    with pytest.raises(ArgumentError, match='load it with towers="both"'):
        model.generate_mask_diffusion([5, 6])
    with pytest.raises(ArgumentError, match='load it with towers="both"'):
        model.save_pretrained(tmp_path)


def test_context_tower_loads_from_shards_without_the_denoisers(copy: Path) -> None:
    tensors = {name: t for name, t in stored(copy).items() if name.startswith("context")}
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, copy / "model.safetensors")
    assert not TwoTowerModel.from_pretrained(copy, towers="context").has_denoiser
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        TwoTowerModel.from_pretrained(copy)


def test_one_report_names_everything_that_does_not_fit(tmp_path: Path) -> None:
    tensors = stored(checkpoint("T1"))
    missing = ["lm_head.weight", "denoiser_tower.layers.1.mixer.experts.5.up_proj.weight"]
    misshaped = ["context_tower.norm_f.weight", "scale_shift_tables.3"]
    for name in missing:
        del tensors[name]
    for name in misshaped:
        tensors[name] = torch.zeros(2, 5)
    unexpected = ["context_tower.layers.99.norm.weight", "rotary.inv_freq"]
    tensors |= {name: torch.zeros(1) for name in unexpected}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(checkpoint("T1") / "config.json", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        TwoTowerModel.from_pretrained(tmp_path)
    for kind, names in (("missing", missing), ("misshaped", misshaped), ("unexpected", unexpected)):
        for name in names:
            assert f"{kind}: {name} " in str(caught.value)
    assert "6 tensors disagree" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 1000, 500_000])
def test_truncated_shard_is_named(copy: Path, keep: int) -> None:
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=f"{SHARD} is truncated or corrupt"):
        TwoTowerModel.from_pretrained(copy)


def test_corrupt_header_is_named(copy: Path) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    content[8:40] = b"\xff" * 32
    (copy / SHARD).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SHARD} is truncated or corrupt"):
        TwoTowerModel.from_pretrained(copy)


def test_absent_shard_is_named(copy: Path) -> None:
    (copy / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"shards that are not there: {SHARD}"):
        TwoTowerModel.from_pretrained(copy)


def test_index_that_disagrees_with_its_shards_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in .* places it in model-00001"):
        TwoTowerModel.from_pretrained(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index_is_refused(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        TwoTowerModel.from_pretrained(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which can run code"):
        TwoTowerModel.from_pretrained(copy)


def test_directory_without_weights_is_named(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        TwoTowerModel.from_pretrained(copy)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    tensors = stored(checkpoint("T1"))
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(checkpoint("T1") / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight in model\.safetensors has dtype I8"):
        TwoTowerModel.from_pretrained(tmp_path)


def test_neither_directory_nor_hub_id_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a directory here nor a hub id"):
        TwoTowerModel.from_pretrained(tmp_path / "no" / "such" / "place")


def full_disk(tmp_path: Path) -> Path:
    """A file system with room for half a checkpoint."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("needs root to mount a small file system")
    return mount


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = full_disk(tmp_path)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("announced", [True, False])
def test_full_disk_leaves_the_old_checkpoint_as_it_was(
    small_disk: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = small_disk / "checkpoint"
    TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    if not announced:  # the space is gone only while the file is being written
        monkeypatch.setattr("twotower_spec.checkpoint.saving._check_space", lambda directory, needed: None)
    with pytest.raises(CheckpointError, match="could not be saved"):
        TwoTowerModel.from_pretrained(checkpoint("T2"), dtype="float32").save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_full_disk_leaves_nothing_under_a_new_name(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"0" * (3 << 20))
    with pytest.raises(CheckpointError, match="could not be saved"):
        TwoTowerModel.from_pretrained(checkpoint("T1")).save_pretrained(small_disk / "new")
    assert list((small_disk / "new").iterdir()) == []


def run_python(code: str, *args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_killed_save_leaves_nothing_under_the_final_names(tmp_path: Path) -> None:
    code = """
        import sys, time
        from twotower_spec import TwoTowerModel
        from twotower_spec.checkpoint import saving
        model = TwoTowerModel.from_pretrained(sys.argv[1])
        def stall(draft, directory):
            print("written", flush=True)
            time.sleep(60)
        saving._move_into_place = stall
        model.save_pretrained(sys.argv[2])
    """
    process = run_python(code, str(checkpoint("T1")), str(tmp_path / "saved"))
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in (tmp_path / "saved").iterdir() if not p.name.startswith(".saving-")] == []


@pytest.mark.slow
def test_loading_never_holds_two_copies_of_the_weights(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=512, vocab_size=4000, n_routed_experts=64, moe_intermediate_size=512)
    TwoTowerModel.from_config(config).save_pretrained(tmp_path)
    code = """
        import re, sys
        from pathlib import Path
        from twotower_spec import TwoTowerModel
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        before = peak()
        model = TwoTowerModel.from_pretrained(sys.argv[1])
        print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
    """
    output, _ = run_python(code, str(tmp_path)).communicate(timeout=120)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights > 500e6  # several windows of the loader
    assert float(output) < 1.4
