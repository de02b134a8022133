"""The bundled models load, generate and draft where no other machine can be reached, and none is asked for."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from twotower_spec.checkpoint import resolve_checkpoint
from twotower_spec.demo import held_out_prompts, trio_directory, trio_path
from twotower_spec.demo.standalone import demo_prompts, run_modes
from twotower_spec.drafting import DraftingSession, FixedPolicy, speculative_loop
from twotower_spec.errors import CheckpointError
from twotower_spec.inspection import inspect_checkpoint
from twotower_spec.training.evaluation import Trio


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Addresses and names of other machines that anything in this process asked for; each gets an error."""
    found: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> NoReturn:
        found.append(arguments)
        raise OSError("the network is blocked in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    # Nothing that was downloaded before, and no setting that forbids to ask.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


def test_every_mode_writes_text(asked: list[Any]) -> None:
    texts = list(run_modes(demo_prompts(1), max_new_tokens=12))
    assert len(texts) > 4 and all(one.num_tokens == 12 or one.text for one in texts)
    assert asked == []


def test_a_verifier_accepts_drafts(asked: list[Any]) -> None:
    trio = Trio(trio_directory())
    prompt = list(trio.tokenizer(held_out_prompts("maths")[0].prompt)["input_ids"])
    drafter = DraftingSession(trio.towers, FixedPolicy(8, 1), num_slots=1)
    result = speculative_loop(trio.verifier, drafter, [prompt], 24, eos_token_id=2)
    assert result.summary.acceptance_length > 1
    assert asked == []


def test_a_checkpoint_is_inspected(asked: list[Any]) -> None:
    assert inspect_checkpoint(trio_path("twotower")).problems == []
    assert asked == []


def test_a_hub_id_is_asked_for_and_nothing_else_is(asked: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="neither a directory here nor a hub id that can be downloaded"):
        resolve_checkpoint("someone/some-model")
    assert asked
