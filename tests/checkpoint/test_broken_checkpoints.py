"""Faults of a checkpoint are reported before anything is loaded, all in one error."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.files import INDEX, change_shard, copy_checkpoint, read_index, stored_tensors, write_index
from tests.support.golden_files import checkpoint
from twotower_spec import CheckpointError, TwoTowerModel
from twotower_spec.errors import TwoTowerError
from twotower_spec.inspection import inspect_checkpoint
from twotower_spec.towers.model import TwoTowers

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def refusal(directory: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        TwoTowerModel.from_pretrained(directory)
    return str(caught.value)


def test_one_report_names_all_missing_unexpected_and_misshaped_tensors(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    names = [n for n in stored_tensors(directory) if n.endswith("in_proj.weight")]
    assert len(names) > 3
    changes: dict[str, torch.Tensor | None] = dict.fromkeys(names)
    changes |= {"lm_head__weight": torch.zeros(255, 64), "context_lm_head__weight": torch.zeros(256, 1, 64)}
    changes |= {"lm_head__bias": torch.zeros(256), "visual__weight": torch.zeros(1)}
    change_shard(directory / "model.safetensors", **changes)
    lines = refusal(directory).splitlines()
    expected = [f"missing: {name} " for name in names]
    expected += ["unexpected: lm_head.bias [256]", "unexpected: visual.weight [1]"]
    expected += ["misshaped: lm_head.weight is [255, 64], config.json makes it [256, 64]"]
    expected += ["misshaped: context_lm_head.weight is [256, 1, 64]"]
    assert f"{len(expected)} tensors disagree" in lines[0]
    assert len(lines) == len(expected) + 1
    assert [text for text in expected if not any(line.strip().startswith(text) for line in lines)] == []


def test_config_of_another_geometry_is_reported_with_both_shapes(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"vocab_size": 256', '"vocab_size": 257'))
    assert "misshaped: context_tower.embeddings.weight is [256, 64], config.json makes it [257, 64]" in refusal(
        directory
    )


LARGER_THAN_STORED: dict[str, tuple[dict[str, object], str]] = {
    "2^31 token ids": ({"vocab_size": 1 << 31}, "config.json makes it [2147483648, 64]"),
    "2^40 token ids": ({"vocab_size": 1 << 40}, "vocab_size 1099511627776 is too large"),
    "integer of 99 digits": ({"hidden_size": 10**98}, "is too large"),
    "a million experts": ({"n_routed_experts": 1_000_000}, "1000 tensors or more disagree"),
    "1024 layers": ({"num_hidden_layers": 1024, "hybrid_override_pattern": "M" * 1024}, "1000 tensors or more"),
    "a million layers": (
        {"num_hidden_layers": 1_000_000, "hybrid_override_pattern": "M" * 1_000_000},
        "num_hidden_layers 1000000 is not allowed; give 1024 at most",
    ),
    "tensors of 2^70 bytes": (
        {"hidden_size": (1 << 32) - 1, "moe_intermediate_size": (1 << 32) - 1},
        "config.json makes a tensor that no memory holds",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), LARGER_THAN_STORED.values(), ids=LARGER_THAN_STORED.keys())
def test_config_that_makes_more_than_is_stored_is_refused_before_memory_is_taken(
    changes: dict[str, object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changes))
    made, init = [], TwoTowers.__init__
    monkeypatch.setattr(TwoTowers, "__init__", lambda self, *a, **k: made.append(k) or init(self, *a, **k))
    with pytest.raises(TwoTowerError, match=re.escape(reason)):
        TwoTowerModel.from_pretrained(directory)
    assert len(made) <= 1
    assert all(options["context_device"] == "meta" for options in made)
    problems = inspect_checkpoint(directory).problems
    assert problems and len(problems) <= 1000


def test_long_list_of_problems_is_cut_in_errors_and_bounded_in_inspections(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    change_shard(directory / "model.safetensors", **dict.fromkeys(stored_tensors(directory)))
    message = refusal(directory)
    assert message.count("\n") <= 40 and message.endswith(" more")
    problems = inspect_checkpoint(directory).problems
    assert f" {len(problems)} tensors disagree" in message and len(problems) == len(stored_tensors(checkpoint("T1")))


@pytest.mark.parametrize("lost", [1, 17, 1_000_000])
def test_truncated_shard_is_named(lost: int, tmp_path: Path) -> None:
    shard = copy_checkpoint("T2", tmp_path) / SECOND
    shard.write_bytes(shard.read_bytes()[:-lost])
    message = refusal(shard.parent)
    assert f"{shard} is truncated or corrupt" in message
    assert "download it again" in message


@pytest.mark.parametrize("header", [b"", b"\x07", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0not a json header"])
def test_corrupt_header_is_named(header: bytes, tmp_path: Path) -> None:
    shard = copy_checkpoint("T1", tmp_path) / "model.safetensors"
    shard.write_bytes(header + shard.read_bytes()[len(header) :] if header else b"")
    assert f"{shard} is truncated or corrupt" in refusal(shard.parent)


def test_absent_shards_are_all_named(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    (directory / FIRST).unlink()
    (directory / THIRD).unlink()
    message = refusal(directory)
    assert f"not there: {FIRST}, {THIRD}" in message


def test_index_that_places_a_tensor_in_another_shard_is_reported(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    places = read_index(directory)["weight_map"]
    name = next(n for n, shard in places.items() if shard == FIRST)
    write_index(directory, {**places, name: THIRD})
    assert f"{name} is in {FIRST} but {INDEX} places it in {THIRD}" in refusal(directory)


def test_index_that_lists_a_tensor_no_shard_holds_is_reported(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    write_index(directory, {**read_index(directory)["weight_map"], "ghost.weight": SECOND})
    assert f"ghost.weight is not in {SECOND}, where {INDEX} places it" in refusal(directory)


def test_index_that_leaves_out_a_stored_tensor_is_reported(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    places = read_index(directory)["weight_map"]
    shard = places.pop("lm_head.weight")
    write_index(directory, places)
    assert f"lm_head.weight is in {shard} but {INDEX} does not list it" in refusal(directory)


def test_tensor_in_two_shards_is_reported(tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    places = read_index(directory)["weight_map"]
    other = next(shard for shard in (FIRST, SECOND, THIRD) if shard != places["lm_head.weight"])
    change_shard(directory / other, lm_head__weight=torch.full((320, 96), 7.0, dtype=torch.bfloat16))
    assert f"lm_head.weight is in {other} but {INDEX} places it in {places['lm_head.weight']}" in refusal(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {}}', "\udcff\udcfe"])
def test_broken_index_is_named(text: str, tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    (directory / INDEX).write_text(text, errors="surrogateescape")
    assert f"{directory / INDEX} is not a safetensors index" in refusal(directory)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "sub/../../x.safetensors", ".."])
def test_shard_outside_the_folder_is_refused_and_not_opened(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    shutil.copy(directory / SECOND, tmp_path / "elsewhere.safetensors")
    places = read_index(directory)["weight_map"]
    write_index(directory, {name: shard if place == SECOND else place for name, place in places.items()})
    monkeypatch.setattr("twotower_spec.checkpoint.index.safe_open", None)
    message = refusal(directory)
    assert f"{directory / INDEX} names a shard outside its folder, {shard!r}" in message


@pytest.mark.parametrize("shard", ["x" * 300, "a\0b", "", "."])
def test_shard_of_an_impossible_name_is_not_there(shard: str, tmp_path: Path) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    write_index(directory, {**read_index(directory)["weight_map"], "lm_head.weight": shard})
    assert "names shards that are not there" in refusal(directory)


def test_shards_may_be_links_to_another_folder_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    directory, blobs = copy_checkpoint("T2", tmp_path), tmp_path / "blobs"
    blobs.mkdir()
    for shard in (FIRST, SECOND, THIRD):
        (directory / shard).rename(blobs / shard)
        (directory / shard).symlink_to(Path("..") / "blobs" / shard)
    assert TwoTowerModel.from_pretrained(directory).config.vocab_size == 320


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    (directory / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(directory)


@pytest.mark.parametrize("name", ["T1", "T2"])
def test_buffers_that_are_computed_anyway_are_harmless(name: str, tmp_path: Path) -> None:
    directory = copy_checkpoint(name, tmp_path)
    shard = directory / ("model.safetensors" if name == "T1" else FIRST)
    buffer = "context_tower__layers__3__mixer__rotary_emb__inv_freq"
    change_shard(shard, **{buffer: torch.zeros(8, dtype=torch.int64)})
    if name == "T2":
        write_index(directory, {**read_index(directory)["weight_map"], buffer.replace("__", "."): FIRST})
    assert inspect_checkpoint(directory).problems == []
    TwoTowerModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("dtype", "meaning"),
    [
        (torch.int8, "I8, integers"),
        (torch.int64, "I64, integers"),
        (torch.float8_e4m3fn, "F8_E4M3, floats of quantised weights"),
        (torch.bool, "BOOL, truth values"),
    ],
)
def test_tensor_that_is_no_plain_float_is_refused_as_what_it_is(
    dtype: torch.dtype, meaning: str, tmp_path: Path
) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    change_shard(directory / "model.safetensors", lm_head__weight=torch.zeros(256, 64).to(dtype))
    message = refusal(directory)
    assert f"lm_head.weight in model.safetensors has dtype {meaning}; allowed are F64" in message


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    shard = copy_checkpoint("T1", tmp_path) / "model.safetensors"
    assert "is a file; give the directory" in refusal(shard)


def test_path_that_does_not_exist_is_refused() -> None:
    assert "'/no/such/place' is neither a directory here nor a hub id" in refusal("/no/such/place")


def test_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "'nobody/nothing-17' is neither a directory here nor a hub id" in refusal("nobody/nothing-17")


def test_other_order_of_tensors_in_a_file_makes_no_difference(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    shard = directory / "model.safetensors"
    tensors = load_file(shard)
    save_file(dict(reversed(tensors.items())), shard)
    loaded = dict(TwoTowerModel.from_pretrained(directory).checkpoint_tensors())
    assert [name for name, tensor in tensors.items() if not torch.equal(loaded[name], tensor)] == []
