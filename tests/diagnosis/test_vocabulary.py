"""Traps in vocabularies: each is planted into the bundled models and found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import copy_of, findings, the, verdicts, with_config, with_permuted_tokens, with_rows
from twotower_spec.diagnosis import vocabulary


def test_the_bundled_models_share_their_tokens() -> None:
    assert verdicts([*findings(vocabulary.examine_drafter), *findings(vocabulary.examine_pair)]) == {"ok"}


def test_another_tokenizer_of_the_same_size_is_found(tmp_path: Path) -> None:
    verifier = with_permuted_tokens(tmp_path / "permuted", "verifier")
    one = the(findings(vocabulary.examine_pair, verifier=verifier), "same tokens", "fault")
    assert "of 2048 ids mean different tokens: 301" in one.detail and "train all" in one.remedy


def test_tokens_that_the_drafter_does_not_have_are_counted(tmp_path: Path) -> None:
    found = findings(vocabulary.examine_pair, with_rows(tmp_path / "small", 2000))
    the(found, "same tokens", "ok")
    assert "48 tokens of the verifier, from id 2000 on" in the(found, "padding", "warning").detail


def test_rows_without_a_token_are_padding_and_no_harm(tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "padded", "verifier", vocab_size=2176)
    one = the(findings(vocabulary.examine_pair, verifier=verifier), "padding", "ok")
    assert "2176 rows, the drafter 2048: ids from 2048 on stay out" in one.detail


def test_a_tokenizer_with_more_ids_than_rows_is_found(tmp_path: Path) -> None:
    drafter = with_config(tmp_path / "rows", vocab_size=2000)
    assert "up to 2047" in the(findings(vocabulary.examine_drafter, drafter), "drafter's tokenizer", "warning").detail


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mask_token_id": 2}, "the eos token"),
        ({"mask_token_id": 0}, "the pad token"),
        ({"mask_token_id": 1}, "the bos token"),
        ({"eos_token_id": [7, 3]}, "the eos token"),
        ({"mask_token_id": 400}, "a piece of text"),
    ],
)
def test_a_mask_token_that_means_something_else_is_found(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    one = the(findings(vocabulary.examine_drafter, with_config(tmp_path / "mask", **changes)), "mask token", "fault")
    assert named in one.detail and "mask_token_id" in one.remedy


def test_a_mask_token_beyond_the_tokenizer_is_no_harm(tmp_path: Path) -> None:
    drafter = with_config(tmp_path / "padded", vocab_size=2176, mask_token_id=2100)
    found = findings(vocabulary.examine_drafter, drafter)
    assert "does not have" in the(found, "mask token", "ok").detail
    assert "128 rows are padding" in the(found, "drafter's tokenizer", "ok").detail


@pytest.mark.parametrize(("rows", "verdict"), [(2048, "warning"), (2176, "fault")])
def test_without_a_tokenizer_sizes_decide(rows: int, verdict: Any, tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "verifier", "verifier", vocab_size=rows)
    drafter = copy_of("twotower", tmp_path / "drafter")
    for file in drafter.glob("tokenizer*"):
        file.unlink()
    assert (
        f"{rows} and 2048" in the(findings(vocabulary.examine_pair, drafter, verifier), "same tokens", verdict).detail
    )
    the(findings(vocabulary.examine_drafter, drafter), "drafter's tokenizer", "warning")


@pytest.mark.parametrize(("rows", "verdict"), [(2048, "warning"), (2176, "fault")])
def test_a_tokenizer_of_the_drafter_that_cannot_be_read_is_named_and_sizes_decide(
    rows: int, verdict: Any, tmp_path: Path
) -> None:
    verifier = with_config(tmp_path / "verifier", "verifier", vocab_size=rows)
    drafter = copy_of("twotower", tmp_path / "drafter")
    (drafter / "tokenizer.json").write_text(json.dumps({"model": 3}))
    detail = the(findings(vocabulary.examine_pair, drafter, verifier), "same tokens", verdict).detail
    assert "cannot be read" in detail and f"{rows} and 2048" in detail and str(drafter) in detail
    the(findings(vocabulary.examine_drafter, drafter, verifier), "drafter's tokenizer", "warning")


@pytest.mark.parametrize(("is_there", "named"), [(True, "cannot be read"), (False, "has no tokenizer")])
def test_a_verifier_whose_tokenizer_vllm_cannot_read_is_a_fault(is_there: bool, named: str, tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "verifier")
    for file in verifier.glob("tokenizer*"):
        file.unlink()
    if is_there:
        (verifier / "tokenizer.json").write_text(json.dumps({"model": 3}))
    one = the(findings(vocabulary.examine_pair, verifier=verifier), "same tokens", "fault")
    assert named in one.detail and "vllm serve needs it" in one.detail and str(verifier) in one.detail
    assert "--skip-tokenizer-init" in one.remedy


@pytest.mark.parametrize(("rows", "verdict"), [(2048, "warning"), (2176, "fault")])
@pytest.mark.parametrize("form", ["tekken.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_a_tokenizer_of_the_verifier_in_another_form_is_left_to_vllm_and_sizes_decide(
    form: str, rows: int, verdict: Any, tmp_path: Path
) -> None:
    verifier = with_config(tmp_path / "verifier", "verifier", vocab_size=rows)
    for file in verifier.glob("tokenizer*"):
        file.unlink()
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
    (verifier / form).write_text(json.dumps(own))
    one = the(findings(vocabulary.examine_pair, verifier=verifier), "same tokens", verdict)
    assert f"{rows} and 2048 ids" in one.detail
