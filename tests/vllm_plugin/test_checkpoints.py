"""Names of one checkpoint are known as such: a hub id, its downloaded files, links to them."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from twotower_spec.demo.trio import trio_path
from vllm_twotower.checkpoints import is_same, is_two_tower

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hub cache with two commits of `some/tower` whose config.json is the same file, as the hub keeps it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--some--tower"
    for commit in (FIRST, SECOND):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").symlink_to(trio_path("twotower") / "config.json")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(FIRST)
    return folder / "snapshots"


def test_a_hub_id_and_its_files_are_one_checkpoint(snapshots: Path) -> None:
    assert is_two_tower("some/tower") and is_two_tower("some/tower", SECOND)
    assert is_same("some/tower", None, "some/tower", "main")
    assert is_same("some/tower", FIRST, str(snapshots / FIRST), None)
    assert not is_same("some/tower", None, "some/tower", SECOND)
    assert not is_same("some/tower", None, str(trio_path("twotower")), None)


def test_what_is_not_there_is_no_checkpoint(tmp_path: Path, snapshots: Path) -> None:
    (tmp_path / "link").symlink_to(trio_path("twotower"))
    assert is_same(str(tmp_path / "link"), None, str(trio_path("twotower")), "main")
    for name in ("some/other", str(tmp_path / "nowhere"), str(tmp_path), "\0", "x" * 5000):
        assert not is_two_tower(name) and not is_same(name, None, name, None)
    assert not is_two_tower(None) and not is_two_tower(str(trio_path("verifier")))
