"""`twotower-spec generate`, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.golden_files import NAMES, checkpoint, generation_cases
from twotower_spec.cli import main
from twotower_spec.model import TwoTowerModel

MODES = {"generate_ar": "ar", "generate_mock_ar": "mock-ar", "generate_mask_diffusion": "mask-diffusion"}


class Run:
    """Outcome of one call of the command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["twotower-spec", *map(str, args)])
        try:
            main()
            code: Any = 0
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def chosen_cases() -> Iterator[tuple[str, int]]:
    for name in NAMES:
        yield from ((name, i) for i in range(0, len(generation_cases(name)), 4))


@pytest.mark.parametrize(("name", "index"), list(chosen_cases()))
def test_json_rows_are_those_of_the_published_code(run: Any, name: str, index: int) -> None:
    case = generation_cases(name)[index]
    args = ["generate", "--model", checkpoint(name), "--mode", MODES[case["mode"]], "--dtype", "float32", "--json"]
    args += ["--token-ids", ids(case["prompt"]), "--max-new-tokens", case["max_new_tokens"]]
    args += ["--ignore-eos"] if case["eos_token_id"] is None else ["--eos-token-id", case["eos_token_id"]]
    if "block_size" in case:
        args += ["--block-size", case["block_size"], "--steps", case["steps_per_block"]]
        args += ["--gamma", case["confidence_threshold"]]
    done = run(*args)
    assert done.code == 0 and done.err == ""
    [row] = done.rows
    assert row["token_ids"] == case["output"][len(case["prompt"]) :]
    assert row["num_denoiser_passes"] == case.get("nfe", row["num_denoiser_passes"])
    assert row["tokens_per_s"] > 0


def test_installed_command_prints_ids_without_a_tokenizer() -> None:
    command = Path(sys.executable).with_name("twotower-spec")
    args = ["generate", "--model", str(checkpoint("T1")), "--token-ids", "12,44,7", "--max-new-tokens", "5"]
    done = subprocess.run([command, *args], capture_output=True, text=True, check=True)
    assert len(done.stdout.strip().split(",")) == 5


def test_several_prompts_in_batches_keep_their_order(run: Any) -> None:
    prompts = [[9, 30, 7], [12] * 20, [55], [6, 7]]
    args = ["generate", "--model", checkpoint("T1"), "--mode", "ar", "--json", "--max-new-tokens", 6]
    single = [run(*args, "--token-ids", ids(p)).rows[0]["token_ids"] for p in prompts]
    together = run(*args, "--batch-size", 3, *[a for p in prompts for a in ("--token-ids", ids(p))]).rows
    assert [row["token_ids"] for row in together] == single
    assert [row["index"] for row in together] == [0, 1, 2, 3]
    assert [row["batch_size"] for row in together] == [3, 3, 3, 1]


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T1 with a tokenizer that knows the words w4 to w255."""
    directory = Path(shutil.copytree(checkpoint("T1"), tmp_path_factory.mktemp("model") / "T1"))
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    vocabulary = special | {f"w{i}": i for i in range(4, 256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(directory)
    return directory


def test_text_goes_in_and_comes_out(run: Any, with_tokenizer: Path) -> None:
    args = ["generate", "--model", with_tokenizer, "--mode", "ar", "--max-new-tokens", 4]
    row = run(*args, "--json", "w12 w44 w7").rows[0]
    assert row["prompt"] == "w12 w44 w7"
    assert row["text"].split() == [f"w{i}" for i in row["token_ids"]]
    assert run(*args, "w12 w44 w7").out == row["text"] + "\n"


def test_text_stops_at_the_end_token_of_the_tokenizer(run: Any, with_tokenizer: Path) -> None:
    args = ["generate", "--model", with_tokenizer, "--mode", "ar", "--max-new-tokens", 200, "--json", "w12 w44 w7"]
    free = run(*args, "--ignore-eos").rows[0]["token_ids"]
    end = next((i for i, token in enumerate(free) if token == 2), None)
    row = run(*args).rows[0]
    assert row["token_ids"] == (free if end is None else free[: end + 1])
    stop = free[5]
    row = run(*args, "--eos-token-id", stop).rows[0]
    assert row["token_ids"][-1] == stop and f"w{stop}" not in row["text"].split()


def test_text_of_a_block_stops_at_its_end_token(run: Any, with_tokenizer: Path) -> None:
    args = ["generate", "--model", with_tokenizer, "--max-new-tokens", 32, "--json", "w12 w44 w7"]
    stop = run(*args).rows[0]["token_ids"][3]
    row = run(*args, "--eos-token-id", stop).rows[0]
    assert len(row["token_ids"]) == 16
    assert row["text"].split() == [f"w{i}" for i in row["token_ids"][: row["token_ids"].index(stop)]]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_are_read_from_a_file(run: Any, with_tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    if suffix == ".txt":
        file.write_text("w9 w8\n\nw7\n")
    else:
        file.write_text('{"text": "w9 w8", "id": 4}\n{"token_ids": [7]}\n')
    args = ["generate", "--model", with_tokenizer, "--mode", "ar", "--max-new-tokens", 3, "--json"]
    rows = run(*args, "--prompt-file", file).rows
    expected = [run(*args, text).rows[0]["token_ids"] for text in ("w9 w8", "w7")]
    assert [row["token_ids"] for row in rows] == expected


def bulk_args(tmp_path: Path, output: str, num_prompts: int = 12) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"token_ids": [6 + i, 9]}) + "\n" for i in range(num_prompts)))
    args = ["generate", "--model", str(checkpoint("T1")), "--prompt-file", str(file), "--max-new-tokens", "16"]
    return [*args, "--temperature", "0.7", "--output", str(tmp_path / output), "--batch-size", "2"]


def tokens_of(file: Path) -> dict[int, list[int]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row["token_ids"] for row in rows}


def test_killed_bulk_run_goes_on_without_repeating_or_losing_a_row(run: Any, tmp_path: Path) -> None:
    assert run(*bulk_args(tmp_path, "whole.jsonl")).code == 0
    code = """
import os, signal
from twotower_spec.cli import main
from twotower_spec.cli.output import ResumableOutput
original = ResumableOutput.append
def append(self, rows):
    original(self, rows)
    if len(self.path.read_text().splitlines()) >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
ResumableOutput.append = append
main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run(
        [sys.executable, "-c", code, *bulk_args(tmp_path, "killed.jsonl")], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    file = tmp_path / "killed.jsonl"
    assert len(tokens_of(file)) == 6
    with file.open("a") as half_written:
        half_written.write('{"index": 6, "token_i')
    assert run(*bulk_args(tmp_path, "killed.jsonl"), "--batch-size", 5).code == 0
    assert tokens_of(file) == tokens_of(tmp_path / "whole.jsonl")


def test_finished_run_loads_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*bulk_args(tmp_path, "out.jsonl"))
    monkeypatch.setattr(TwoTowerModel, "from_pretrained", None)
    done = run(*bulk_args(tmp_path, "out.jsonl"))
    assert done.code == 0 and "all 12 rows" in done.err


@pytest.mark.parametrize("change", [["--seed", "1"], ["--steps", "3"], ["--mode", "ar"], ["--dtype", "float64"]])
def test_output_of_other_settings_is_not_mixed_with(run: Any, tmp_path: Path, change: list[str]) -> None:
    run(*bulk_args(tmp_path, "out.jsonl", 4))
    before = (tmp_path / "out.jsonl").read_bytes()
    done = run(*bulk_args(tmp_path, "out.jsonl", 4), *change)
    assert done.code == 2 and "begun with other prompts or settings" in done.err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run(*bulk_args(tmp_path, "out.jsonl", 4), *change, "--overwrite").code == 0
    assert len(tokens_of(tmp_path / "out.jsonl")) == 4


def test_file_that_is_no_output_is_not_overwritten(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("dear diary\n")
    done = run(*bulk_args(tmp_path, "out.jsonl"))
    assert done.code == 2 and "is not a row of such a run" in done.err
    assert (tmp_path / "out.jsonl").read_text() == "dear diary\n"


def test_two_runs_do_not_share_an_output(run: Any, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "out.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run(*bulk_args(tmp_path, "out.jsonl"))
    assert done.code == 2 and "is being written by another run" in done.err


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "no prompt": ([], "0 sources of prompts"),
    "two sources": (["--token-ids", "5", "text"], "2 sources of prompts"),
    "text without tokenizer": (["text"], "has no tokenizer"),
    "ids that are no integers": (["--token-ids", "5,x"], "'5,x' is not a list of ids"),
    "id outside the vocabulary": (["--token-ids", "5,256"], "token id 256 in prompt 0"),
    "negative id": (["--token-ids=-1"], "token id -1"),
    "unknown dtype": (["--token-ids", "5", "--dtype", "int4"], "dtype 'int4' is not allowed"),
    "absent device": (["--token-ids", "5", "--context-device", "cuda:63"], "device cuda:63 is not there"),
    "no device": (["--token-ids", "5", "--denoiser-device", "fridge"], "'fridge' is not a device name"),
    "gamma": (["--token-ids", "5", "--gamma", "3"], "confidence_threshold 3.0"),
    "steps": (["--token-ids", "5", "--steps", "0"], "steps_per_block 0"),
    "block size": (["--token-ids", "5", "-S", "-4"], "block_size -4"),
    "batch size": (["--token-ids", "5", "--batch-size", "0"], "--batch-size 0"),
    "new tokens": (["--token-ids", "5", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    "temperature": (["--token-ids", "5", "--temperature", "-1"], "temperature -1.0"),
    "top-p": (["--token-ids", "5", "--top-p", "0"], "top_p 0.0"),
    "end token": (["--token-ids", "5", "--eos-token-id", "999"], "eos_token_id 999"),
    "mask token": (["--token-ids", "5", "--mask-token-id", "256"], "mask_token_id 256"),
    "prompt file": (["--prompt-file", "/no/such/file"], "prompt file /no/such/file cannot be read"),
    "output": (["--token-ids", "5", "--output", "/no/such/place.jsonl"], "output file /no/such/place.jsonl"),
}


@pytest.mark.parametrize(("args", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_sentence_before_anything_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.setattr(TwoTowerModel, "from_pretrained", None)
    done = run("generate", "--model", checkpoint("T1"), *args)
    assert done.code == 2
    assert done.out == "" and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("line", ["not json", "[1]", '{"question": 3}', '{"token_ids": ["a"]}'])
def test_bad_line_of_a_prompt_file_is_named(run: Any, tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5]}\n' + line + "\n")
    done = run("generate", "--model", checkpoint("T1"), "--prompt-file", tmp_path / "p.jsonl")
    assert done.code == 2 and f"{tmp_path / 'p.jsonl'}:2" in done.err


def test_missing_checkpoint_is_one_sentence(run: Any, tmp_path: Path) -> None:
    done = run("generate", "--model", tmp_path / "nowhere", "--token-ids", "5")
    assert done.code == 2 and done.err.count("\n") == 1 and "neither a directory here nor a hub id" in done.err
