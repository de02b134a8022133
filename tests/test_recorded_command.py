import json
import shlex
import sys

import pytest

from twotower_spec.recorded_command import recorded_command, recorded_text, without_secret_values, without_secrets


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "s3cr3t"],
        ["--api-key=s3cr3t"],
        ["--api-key", "s3cr3t", "also-s3cr3t"],
        ["--serve-args", "--api-key s3cr3t --port 3"],
        ["--serve-args", "--api-key=s3cr3t"],
        ["--serve-args=--api-key=s3cr3t"],
        ["--serve-args=--api-key 's3cr3t s3cr3t' --port 3"],
        ["--serve-args", "--api-key s3cr3t don't"],
        ["--engine-args", '{"hf_token": "s3cr3t", "nested": [{"password": "s3cr3t"}]}'],
        ["--rival", 'mine={"method": "eagle", "api_key": "s3cr3t"}'],
        ["HF_TOKEN=s3cr3t"],
        ["env", "OPENAI_API_KEY=s3cr3t"],
        ["--base-url", "http://user:s3cr3t@host:8000/v1"],
        ["--base-url", "http://host/v1?api_key=s3cr3t&x=1"],
        ["--header", "Authorization: Bearer s3cr3t"],
        ["--model", "hf_s3cr3tS3CR3Ts3cr3t"],
        ["sk-s3cr3ts3cr3t"],
    ],
)
def test_secret_is_in_no_recorded_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "s3cr3t" not in " ".join(without_secrets(words)).lower()
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "bench", *words, "--repeat", "3"])
    assert "s3cr3t" not in recorded_command().lower()
    assert shlex.split(recorded_command())[-2:] == ["--repeat", "3"]
    # Files that were written before have it, reports of them do not.
    assert "s3cr3t" not in recorded_text(shlex.join(words)).lower()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--max-new-tokens", "5", "--token-ids", "1,2", "--eos-token-id=4", "a - b --c"],
        ["sweep", "--first-token", "context", "--num-speculative-tokens", "7"],
        ["--engine-args", '{"max_model_len":  64}', "--dataset", "owner/name", "--rival", 'a={"x":1}'],
        ["it's", "{", "-", "--", "-=", "-w@=3", "[" * 100_000],
    ],
)
def test_all_else_is_recorded_as_it_was_typed(words: list[str]) -> None:
    assert without_secrets(words) == words
    assert recorded_text(shlex.join(words)) == shlex.join(words)


def test_secret_names_in_json_have_no_values() -> None:
    value = {"api_key": "a", "hf_token": None, "list": [{"Password": "b"}, 3], "token_ids": [1, 2]}
    hidden = {"api_key": "HIDDEN", "hf_token": None, "list": [{"Password": "HIDDEN"}, 3], "token_ids": [1, 2]}
    assert json.loads(json.dumps(without_secret_values(value))) == hidden
