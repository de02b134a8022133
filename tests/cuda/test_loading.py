"""Checkpoints read onto emulated devices: every tensor to the bit, in few copies, and no thread is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.checkpoint.files import copy_checkpoint, stored_tensors
from tests.support.cuda import emulated_devices
from tests.support.golden_files import NAMES, checkpoint
from twotower_spec import CheckpointError, TwoTowerModel
from twotower_spec.checkpoint import CheckpointIndex, load_tensors, shards
from twotower_spec.config import EXPERT_DTYPES

DEVICES = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "cpu")]
# Embeddings are of 64 KiB: they come in pieces, while small tensors share a buffer.
SMALL = 50_000


@pytest.fixture
def small_buffers() -> Iterator[None]:
    with patch.object(shards, "BUFFER_BYTES", SMALL):
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def load(
    name: str, devices: tuple[str, str] = ("cpu", "cpu"), dtype: str | None = None, experts_dtype: str | None = None
) -> dict[str, Tensor]:
    context, denoiser = devices
    model = TwoTowerModel.from_pretrained(
        checkpoint(name), dtype=dtype, experts_dtype=experts_dtype, context_device=context, denoiser_device=denoiser
    )
    return dict(model.checkpoint_tensors())


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().view(torch.uint8)

    return [name for name, tensor in expected.items() if not torch.equal(bits(found[name]), bits(tensor))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", DEVICES)
def test_every_tensor_is_that_of_a_cpu(name: str, devices: tuple[str, str]) -> None:
    expected = load(name)
    with emulated_devices():
        found = load(name, devices)
        assert {str(tensor.device) for tensor in found.values()} == set(devices)
        assert differing(found, expected) == []


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_so_is_what_comes_in_pieces(name: str, devices: tuple[str, str], dtype: str | None) -> None:
    expected = load(name, dtype=dtype)
    with emulated_devices():
        assert differing(load(name, devices, dtype), expected) == []


@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("buffer_bytes", [4_000, SMALL])
def test_experts_are_quantised_on_their_device_in_pieces_or_not(experts_dtype: str, buffer_bytes: int) -> None:
    expected = load("T2", experts_dtype=experts_dtype)
    with emulated_devices(), patch.object(shards, "BUFFER_BYTES", buffer_bytes):
        assert differing(load("T2", ("cuda:0", "cuda:1"), experts_dtype=experts_dtype), expected) == []


@pytest.mark.usefixtures("small_buffers")
def test_the_host_waits_for_a_buffer_at_most_and_devices_hold_two_more() -> None:
    index = CheckpointIndex(checkpoint("T1"))
    num_bytes = sum(stored.nbytes for stored in index.values())
    with emulated_devices() as usage:
        destinations = {name: torch.empty(stored.shape, device="cuda:0") for name, stored in index.items()}
        usage.reset()
        held = usage.held[0]
        load_tensors(index, destinations)
        assert set(usage.waits_by_source()) == {
            "twotower_spec/checkpoint/shards.py: self._sent.synchronize(), synchronize an event"
        }
        # T1's 282 tensors in 55 copies with 53 waits, one before each buffer is filled again: the emulator's events
        # have never passed when they are asked first.
        num_copies = usage.launches["_to_copy"]
        assert usage.waits.total() == num_copies - 2 < 1.5 * num_bytes / SMALL < len(index) / 3
        assert usage.peak[0] - held <= 2 * SMALL


def test_a_small_checkpoint_goes_to_a_device_in_one_copy_without_a_wait() -> None:
    index = CheckpointIndex(checkpoint("T1"))
    with emulated_devices() as usage:
        destinations = {name: torch.empty(stored.shape, device="cuda:0") for name, stored in index.items()}
        usage.reset()
        load_tensors(index, destinations)
        assert usage.launches["_to_copy"] == 1 and not usage.waits


@pytest.mark.usefixtures("small_buffers")
def test_a_shard_that_is_damaged_meanwhile_raises_what_it_raises_on_a_cpu(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    index = CheckpointIndex(directory)
    stored = stored_tensors(directory)
    damaged = sorted(directory.glob("*.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])

    def refusal(device: str) -> str:
        with pytest.raises(CheckpointError, match=r"is truncated or corrupt .*; download it again") as caught:
            load_tensors(index, {name: torch.empty_like(tensor, device=device) for name, tensor in stored.items()})
        return str(caught.value)

    expected = refusal("cpu")
    assert str(damaged) in expected
    with emulated_devices():
        assert refusal("cuda:0") == expected


@pytest.mark.usefixtures("small_buffers")
def test_reading_ends_where_a_tensor_cannot_be_stored() -> None:
    index = CheckpointIndex(checkpoint("T1"))
    with emulated_devices():
        destinations = {name: torch.empty(stored.shape, device="cuda:0") for name, stored in index.items()}
        destinations["lm_head.weight"].requires_grad_()
        with pytest.raises(RuntimeError, match="leaf Variable") as caught:
            load_tensors(index, destinations)
        # Even while the error, and all that it refers to, is at hand.
        assert caught.value.__traceback__ and not [
            thread for thread in threading.enumerate() if "twotower-reader" in thread.name
        ]
