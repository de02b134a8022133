"""`twotower-spec inspect T --verifier V`: whether both mean the same tokens, seen without their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command
from tests.support.golden_files import checkpoint
from twotower_spec.checkpoint import index
from twotower_spec.demo.trio import trio_path


def without_weights(model: Any, folder: Path) -> Path:
    """A copy of a bundled model that holds only what the comparison may read."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trio_path(model) / name, folder)
    return folder


def swap_tokens(folder: Path, first: int, second: int) -> tuple[str, str]:
    """Gives each of two ids the other's token; returns their former tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    names = {token_id: token for token, token_id in vocab.items()}
    vocab[names[first]], vocab[names[second]] = second, first
    path.write_text(json.dumps(content))
    return names[first], names[second]


def test_the_bundled_trio_shares_its_tokenizer(command: Command, tmp_path: Path) -> None:
    twotower, verifier = without_weights("twotower", tmp_path / "t"), without_weights("verifier", tmp_path / "v")
    code, out, err = command("inspect", twotower, "--verifier", verifier)
    assert (code, err) == (0, "")
    assert "2048 ids are shared" in out
    code, out, _ = command("inspect", twotower, "--verifier", verifier, "--json")
    assert code == 0
    assert json.loads(out) == {
        "drafter": str(twotower),
        "verifier": str(verifier),
        "shares_tokenizer": True,
        "drafter_ids": 2048,
        "verifier_ids": 2048,
        "shared_ids": 2048,
        "compared_ids": 2048,
        "differences": [],
    }


def test_a_swapped_pair_is_shown_with_what_both_mean_by_it(command: Command, tmp_path: Path) -> None:
    verifier = without_weights("verifier", tmp_path / "verifier")
    first, second = swap_tokens(verifier, 300, 301)
    code, out, err = command("inspect", trio_path("twotower"), "--verifier", verifier)
    assert (code, err) == (2, "")
    assert "2 of 2048 ids mean different tokens" in out
    assert all(text in out for text in ("300", "301", repr(first), repr(second), "twotower-spec train all"))
    code, out, _ = command("inspect", trio_path("twotower"), "--verifier", verifier, "--json")
    assert code == 2
    assert json.loads(out)["differences"] == [
        {"token_id": 300, "verifier": second, "drafter": first},
        {"token_id": 301, "verifier": first, "drafter": second},
    ]


def test_only_the_first_of_many_differences_are_shown(command: Command, tmp_path: Path) -> None:
    verifier = without_weights("verifier", tmp_path / "verifier")
    for first in range(300, 314, 2):
        swap_tokens(verifier, first, first + 1)
    code, out, _ = command("inspect", trio_path("twotower"), "--verifier", verifier)
    assert code == 2
    assert "14 of 2048" in out and "309" in out and "310" not in out and "and 4 more" in out


def test_rows_of_a_padded_or_nested_verifier_are_read_from_its_config(command: Command, tmp_path: Path) -> None:
    verifier = without_weights("verifier", tmp_path / "verifier")
    (verifier / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 2176}}))
    code, out, _ = command("inspect", trio_path("twotower"), "--verifier", verifier, "--json")
    found = json.loads(out)
    assert (code, found["verifier_ids"], found["shared_ids"]) == (0, 2176, 2048)


@pytest.mark.parametrize("model", ["twotower", "verifier"])
def test_a_missing_tokenizer_is_one_sentence(model: str, command: Command, tmp_path: Path) -> None:
    models = {name: without_weights(name, tmp_path / name) for name in ("twotower", "verifier")}
    for path in models[model].glob("tokenizer*"):
        path.unlink()
    code, out, err = command("inspect", models["twotower"], "--verifier", models["verifier"])
    assert (code, out) == (2, "")
    assert f"{models[model]} has no tokenizer" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("drafter", "verifier", "named"),
    [
        ("verifier", "twotower", "is not a TwoTower checkpoint"),
        ("twotower", "nowhere", "nowhere"),
        ("twotower", "nameless", "no config.json that names its vocab_size"),
        ("twotower", "list", "no config.json that names its vocab_size"),
        ("twotower", "empty", "no config.json that names its vocab_size"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    drafter: Any, verifier: str, named: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (without_weights("verifier", tmp_path / "nameless") / "config.json").write_text("{}")
    (without_weights("verifier", tmp_path / "list") / "config.json").write_text("[1]")
    other = trio_path("twotower") if verifier == "twotower" else tmp_path / verifier
    code, out, err = command("inspect", trio_path(drafter), "--verifier", other)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and named in err and err.count("\n") == 1


def test_tokenizers_without_a_common_id_do_not_match(command: Command, tmp_path: Path) -> None:
    verifier = without_weights("verifier", tmp_path / "verifier")
    (verifier / "config.json").write_text(json.dumps({"vocab_size": 0}))
    code, out, _ = command("inspect", trio_path("twotower"), "--verifier", verifier)
    assert code == 2 and "no id has a token in both" in out


def test_a_hub_id_brings_no_weights(monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path) -> None:
    """The download is replaced by a folder of what it was asked for."""
    asked: list[str] = []
    verifier = without_weights("verifier", tmp_path / "verifier")

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "owner/verifier" and revision is None
        asked.extend(allow_patterns)
        return str(verifier)

    monkeypatch.setattr(index, "snapshot_download", download)
    code, _, _ = command("inspect", trio_path("twotower"), "--verifier", "owner/verifier")
    assert code == 0
    assert {"config.json", "*token*.json"} <= set(asked)
    assert not any(
        Path(name).match(pattern) for pattern in asked for name in ("model.safetensors", "model.bin", "x.pt")
    )


def test_a_checkpoint_without_a_tokenizer_is_still_inspected_alone(command: Command) -> None:
    assert command("inspect", checkpoint("T1"))[0] == 0
