"""Trouble with files and disks, and interrupts: a user sees one sentence, no traceback, and loses nothing."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command
from tests.support.golden_files import checkpoint
from twotower_spec.cli.interrupts import Interrupts
from twotower_spec.demo import trio_path

BASE = ["generate", "--model", checkpoint("T1"), "--mode", "ar", "--max-new-tokens", 5]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(count: int) -> list[str]:
    return [arg for i in range(count) for arg in ("--token-ids", f"{6 + i},9,17")]


def assert_one_sentence(result: tuple[int, str, str], *named: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [text for text in named if text not in err] == []


def test_full_disk_keeps_finished_rows_and_the_next_start_adds_the_others(command: Command, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert command(*BASE, *prompts(5), "--output", whole)[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for two rows and a part of the third.
    room = sum(len(line) for line in whole.read_bytes().splitlines(keepends=True)[:2]) + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        stopped = command(*BASE, *prompts(5), "--output", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_sentence(stopped, f"output file {file} cannot be written", "finished rows are kept")
    assert 0 < file.read_bytes().count(b"\n") < 5
    assert command(*BASE, *prompts(5), "--output", file)[0] == 0
    assert [(r["index"], r["token_ids"]) for r in rows(file)] == [(r["index"], r["token_ids"]) for r in rows(whole)]


# Reading a device back, as a resumed run does, would never end.
@pytest.mark.parametrize("device", ["/dev/full", "/dev/null", "/dev/zero"])
def test_device_as_output_is_refused(device: str, command: Command) -> None:
    assert_one_sentence(command(*BASE, *prompts(1), "--output", device), f"{device} is not a regular file")


def test_directory_as_output_is_refused(command: Command, tmp_path: Path) -> None:
    assert_one_sentence(command(*BASE, *prompts(1), "--output", tmp_path), f"{tmp_path} is not a regular file")


def test_interrupt_says_how_to_go_on_and_the_next_start_adds_the_others(command: Command, tmp_path: Path) -> None:
    file, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    # Long enough to be interrupted: the test counts the rows while it runs.
    args = [*map(str, BASE[:-1]), "200", *prompts(10), "--output"]
    installed = Path(sys.executable).with_name("twotower-spec")
    process = subprocess.Popen([installed, *args, str(file)], stderr=subprocess.PIPE, text=True)
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted; a run with --output or --json goes on where it stopped when started again\n"
    assert 3 <= len(rows(file)) < 10
    assert command(*args, file)[0] == 0
    assert command(*args, whole)[0] == 0
    assert [(r["index"], r["token_ids"]) for r in rows(file)] == [(r["index"], r["token_ids"]) for r in rows(whole)]


def test_an_interrupt_that_gets_lost_is_raised_at_the_next_check() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        with suppress(KeyboardInterrupt):  # as Python does inside a callback of the garbage collector
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_byte_order_mark_of_a_prompt_file_is_no_part_of_the_prompt(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"token_ids": [6, 9, 17]}\r\n', encoding="utf-8-sig", newline="")
    code, out, _ = command(*BASE, "--prompt-file", file)
    assert (code, out) == (0, command(*BASE, *prompts(1))[1])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_line_separator_inside_a_json_string_does_not_end_the_line(
    separator: str, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"note": f"a{separator}b", "token_ids": [6, 9, 17]}, ensure_ascii=False) + "\n")
    assert command(*BASE, "--prompt-file", file)[0] == 0


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xff\xfe\x00"])
def test_prompt_file_without_a_readable_prompt_is_refused(content: bytes, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    assert_one_sentence(command(*BASE, "--prompt-file", file), f"prompt file {file}")


@pytest.mark.parametrize("ids", ["[]", "[5, true]", "[-1]", "[256]", "[" + "9" * 30 + "]"])
def test_bad_ids_in_a_prompt_file_are_refused(ids: str, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"token_ids": {ids}}}\n')
    assert_one_sentence(command(*BASE, "--prompt-file", file), "prompt 0")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"added_tokens": [], "model": {"type": "Unheard"}}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer_is_refused(file: str, content: str, command: Command, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint("T1"), tmp_path / "T1"))
    (directory / file).write_text(content)
    result = command("generate", "--model", directory, "some text")
    assert_one_sentence(result, f"the tokenizer in {directory} cannot be read")


HOSTILE_TOKENIZERS = {
    "nested without end": ("tokenizer.json", "[" * 100_000, "tokenizer.json:1 is not JSON"),
    "digits": ("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}", "tokenizer_config.json:1 is not"),
    "half a character": ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "half of a surrogate pair"),
    "a panic of Rust": (
        "tokenizer.json",
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        "Precomp",
    ),
}


@pytest.mark.parametrize(("file", "content", "reason"), HOSTILE_TOKENIZERS.values(), ids=HOSTILE_TOKENIZERS.keys())
def test_hostile_tokenizer_is_refused_in_one_sentence(
    file: str, content: str | dict[str, object], reason: str, command: Command, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(trio_path("twotower"), tmp_path / "T"))
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / file).read_text()) | content)
    (directory / file).write_text(content)
    result = command("generate", "--model", directory, "some text")
    assert_one_sentence(result, f"the tokenizer in {directory} cannot be read")
    assert reason in result[2]


def test_text_that_the_tokenizer_does_not_take_is_refused_before_weights_are_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(trio_path("twotower"), tmp_path / "T"))
    words = {"type": "WordLevel", "vocab": {"known": 4}, "unk_token": "absent"}
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": words}))
    monkeypatch.setattr("twotower_spec.model.TwoTowerModel.from_pretrained", None)
    result = command("generate", "--model", directory, "known", "unknown")
    assert_one_sentence(result, "the tokenizer does not take prompt ")


@pytest.mark.parametrize("seed", [str(1 << 63), "-" + str((1 << 63) + 1)])
def test_seed_beyond_64_bits_is_refused(seed: str, command: Command) -> None:
    assert_one_sentence(command(*BASE, *prompts(1), f"--seed={seed}"), f"seed {seed}")


@pytest.mark.parametrize(
    "args", [["generate", "--model"], ["generate", "--batch-size", "x"], ["inspect"], ["nonsense"]]
)
def test_wrong_usage_exits_with_2_and_no_traceback(args: list[str], command: Command) -> None:
    assert_one_sentence(command(*args), "; see twotower-spec")


def test_generate_without_a_prompt_asks_for_one(command: Command) -> None:
    assert_one_sentence(command("generate"), "0 sources of prompts were given")


@pytest.mark.parametrize("command_name", ["generate", "inspect"])
def test_help_names_every_option(command_name: str, command: Command) -> None:
    code, out, _ = command(command_name, "--help")
    assert code == 0
    assert "--dtype" in out and "--json" in out and "--revision" in out


def test_broken_weights_are_reported_without_a_traceback(command: Command, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint("T1"), tmp_path / "T1"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-17])
    result = command("generate", "--model", directory, *prompts(1))
    assert_one_sentence(result, f"{weights} is truncated or corrupt")


def test_broken_weights_do_not_empty_the_output_that_was_to_be_overwritten(command: Command, tmp_path: Path) -> None:
    directory, file = Path(shutil.copytree(checkpoint("T1"), tmp_path / "T1")), tmp_path / "out.jsonl"
    args = ["generate", "--model", directory, "--mode", "ar", "--max-new-tokens", 5, *prompts(2), "--output", file]
    assert command(*args)[0] == 0
    before = file.read_bytes()
    (directory / "model.safetensors").write_bytes(b"")
    assert command(*args, "--overwrite")[0] == 2
    assert file.read_bytes() == before
