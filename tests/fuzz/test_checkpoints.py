"""config.json, the index of shards, and the headers of shards, as nobody should have written them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.inputs import as_json, changed, damaged, values
from tests.fuzz.refusal import fuzzed, refuses_or_takes
from tests.support.golden_files import checkpoint
from twotower_spec.checkpoint.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex
from twotower_spec.config import TwoTowerConfig
from twotower_spec.inspection import inspect_checkpoint

CONFIG = json.loads((checkpoint("T1") / "config.json").read_text(encoding="utf-8"))
HEADER = {
    "context_tower.a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "denoiser_tower.a.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}
DATA = bytes(32)
INDEX = {
    "metadata": {"total_size": 32},
    "weight_map": {name: "model-00001-of-00001.safetensors" for name in HEADER if name != "__metadata__"},
}


def shard(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + DATA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(as_json(CONFIG))
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(shard(as_json(HEADER)))
    return tmp_path


@fuzzed()
@given(changed(CONFIG))
def test_config_with_changed_values(folder: Path, content: Any) -> None:
    (folder / "config.json").write_bytes(as_json(content))
    refuses_or_takes(TwoTowerConfig.from_pretrained, folder)


@fuzzed()
@given(damaged(as_json(CONFIG)))
def test_config_that_is_damaged(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refuses_or_takes(inspect_checkpoint, folder)


@fuzzed()
@given(changed(INDEX).map(as_json) | damaged(as_json(INDEX)))
def test_index(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    refuses_or_takes(CheckpointIndex, folder)


shapes = st.lists(st.sampled_from((0, 1, 3, 2**31, 2**40, 2**63, -1)), max_size=9)


@fuzzed()
@given(
    st.builds(
        shard,
        changed(HEADER, values | shapes | st.sampled_from(("I64", "F8_E4M3", "F64", "U16"))).map(as_json)
        | damaged(as_json(HEADER)),
        st.none() | st.sampled_from((0, 1, 2**31, 2**63, 2**64 - 1)) | st.integers(0, 400),
    )
    | damaged(shard(as_json(HEADER)))
)
def test_header_of_a_shard(folder: Path, content: bytes) -> None:
    (folder / SINGLE_FILE).write_bytes(content)
    refuses_or_takes(inspect_checkpoint, folder)
