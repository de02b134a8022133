"""A checkpoint that a full disk has no room for ends a training with one sentence; the one before it stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from twotower_bench.faults.disks import full_disk
from twotower_spec.errors import TrainingError
from twotower_spec.training.loop import TrainingRun


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before() -> None:
    with full_disk() as folder:
        run = TrainingRun("verifier", folder, cast(Any, None), "fingerprint")
        optimiser: Any = SimpleNamespace(leaves={"w": torch.zeros(1000)}, state_tensors=dict)
        run._save(optimiser, 10)
        before = run.checkpoint_file.read_bytes()
        optimiser.leaves = {"w": torch.zeros(50_000)}
        with pytest.raises(TrainingError, match=r"at step 20 cannot be written in .*; free space and start again"):
            run._save(optimiser, 20)
        assert run.checkpoint_file.read_bytes() == before
        assert [path.name for path in folder.iterdir()] == [run.checkpoint_file.name]
