"""Files as users bring them: what every reader takes, and what it refuses in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command
from tests.support.golden_files import checkpoint
from twotower_bench.cli.options import check_model_path, same_model
from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.plan import ServingProfile
from twotower_bench.records import ServingCell
from twotower_bench.report.reading import read_measurements
from twotower_spec.checkpoint import CheckpointIndex
from twotower_spec.cli.output import ResumableOutput
from twotower_spec.cli.prompts import read_prompts
from twotower_spec.config import TwoTowerConfig
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError, ConfigError, FileError, TwoTowerError
from twotower_spec.evaluation.datasets import load_prompts
from twotower_spec.inspection import compare_with_verifier
from twotower_spec.reading import (
    MAX_DEPTH,
    MAX_DIGITS,
    STDIN,
    holds_json_lines,
    parse_json,
    read_json,
    read_rows,
    read_text,
    read_toml,
)
from twotower_spec.training.corpus import user_texts
from twotower_spec.training.recipe import load_recipe
from twotower_spec.training.workspace import Workspace, keep_standard_input

DEEP = "[" * 100_000
HOSTILE = {
    "nested without end": DEEP,
    "nested deeper than a walk may go": '{"x": ' + "[" * 900 + "]" * 900 + "}",
    "integer of 5000 digits": '{"x": ' + "9" * 5000 + "}",
    "integer of 4000 digits": '{"x": ' + "9" * 4000 + "}",
    "half a character": '{"prompt": "a\\ud800b"}',
    "half a character as a name": '{"\\udfff": 1}',
    "no JSON": "{",
    "no object": "[1]",
    "nothing but a name": '"\\u0000"',
    "not UTF-8": '{"prompt": "\udcff"}',
}


def read_config(directory: Path, text: bytes) -> None:
    (directory / "config.json").write_bytes(text)
    TwoTowerConfig.from_pretrained(directory)


def read_verifier(directory: Path, text: bytes) -> None:
    (directory / "config.json").write_bytes(text)
    compare_with_verifier(checkpoint("T1"), directory)


def read_index(directory: Path, text: bytes) -> None:
    (directory / "model.safetensors.index.json").write_bytes(text)
    CheckpointIndex(directory)


def reading(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], None]:
    def write_and_read(directory: Path, text: bytes) -> None:
        (directory / name).write_bytes(text + b"\n")
        read(directory / name)

    return write_and_read


def resume(path: Path) -> None:
    with ResumableOutput(path, "run"):
        pass


def go_on(path: Path) -> None:
    with MeasurementFile[ServingCell]({}, {"cell": ServingCell}, lambda cell: cell.place).opened(path, overwrite=False):
        pass


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "config": read_config,
    "verifier's config": read_verifier,
    "index": read_index,
    "prompts": reading("p.jsonl", lambda path: read_prompts([], [], path)),
    "prompts, ndjson": reading("p.ndjson", lambda path: read_prompts([], [], path)),
    "resumed output": reading("out.jsonl", resume),
    "measurements": reading("m.jsonl", go_on),
    "dataset": reading("d.json", load_prompts),
    "known dataset": reading("d.jsonl", lambda path: load_prompts(f"gsm8k={path}")),
    "training text": reading("t.ndjson", lambda path: list(user_texts([path]))),
    "profile": reading("p.json", ServingProfile.load),
    "report": reading("r.jsonl", lambda path: read_measurements([path])),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_hostile_content_is_refused_in_one_sentence(
    read: Callable[[Path, bytes], None], text: str, tmp_path: Path
) -> None:
    with pytest.raises(TwoTowerError) as refused:
        read(tmp_path, text.encode(errors="surrogateescape"))
    message = str(refused.value)
    assert str(tmp_path) in message and len(message) < 1000 and "\n" not in message


@pytest.mark.parametrize(
    "text",
    ["x = " + "[" * 100_000, "x = " + "9" * 5000, "x = " + "9" * 4000, 'x = "\\ud800"', "x = " + "[" * 200 + "]" * 200],
)
def test_hostile_recipe_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(FileError, match=r"recipe .*r\.toml cannot be read"):
        load_recipe(tmp_path / "r.toml")


LONG_NAMES: dict[str, Callable[[Path], object]] = {
    "config": TwoTowerConfig.from_pretrained,
    "prompts": lambda path: read_prompts([], [], path.with_suffix(".jsonl")),
    "resumed output": lambda path: ResumableOutput(path, "run"),
    "dataset": lambda path: load_prompts(path.with_suffix(".jsonl")),
    "training text": lambda path: list(user_texts([path])),
    "recipe": load_recipe,
    "report": lambda path: read_measurements([path]),
    "profile": ServingProfile.load,
    "verifier": lambda path: compare_with_verifier(checkpoint("T1"), path),
}


@pytest.mark.parametrize("read", LONG_NAMES.values(), ids=LONG_NAMES.keys())
def test_name_too_long_for_any_file_is_refused_in_one_sentence(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(TwoTowerError):
        read(tmp_path / ("x" * 300))


def test_benchmark_takes_a_name_too_long_for_any_file_for_a_hub_id() -> None:
    assert same_model("x" * 300) == "x" * 300
    with pytest.raises(ArgumentError, match="is no directory with a config"):
        check_model_path("--verifier", "/" + "x" * 300)


def test_text_that_cannot_be_read_is_refused_before_a_training_makes_anything(tmp_path: Path) -> None:
    good, bad, verifier = tmp_path / "good.txt", tmp_path / "bad.jsonl", tmp_path / "verifier"
    good.write_text("Once upon a time.")
    bad.write_text('{"text": "a"}\n{"text": "\\udc00"}\n')
    recipe = load_recipe(None)
    with pytest.raises(FileError, match=r"bad\.jsonl:2 .* half of a surrogate pair"):
        Workspace(tmp_path / "out", recipe, trio_path("verifier"), [good, bad])
    shutil.copytree(trio_path("verifier"), verifier)
    (verifier / "config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"config\.json:1 is not JSON"):
        Workspace(tmp_path / "out", recipe, verifier, [good])
    assert not (tmp_path / "out").exists()


def test_what_is_within_the_bounds_is_read(tmp_path: Path) -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text in (deep, "9" * MAX_DIGITS, '"\\ud83d\\ude00"', '{"x": [NaN, Infinity, -0.0, 1e400]}'):
        assert repr(parse_json(text, "it", "")) == repr(json.loads(text))
    with pytest.raises(FileError, match=f"nests deeper than {MAX_DEPTH} levels"):
        parse_json(f"[{deep}]", "it", "give less")
    with pytest.raises(FileError, match=f"an integer of {MAX_DIGITS + 1} digits"):
        parse_json("9" * (MAX_DIGITS + 1), "it", "give less")


def test_line_of_a_whole_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": 1,\n"b": 2\n"c": 3}')
    with pytest.raises(FileError, match=r"c\.json:3 is not JSON \(Expecting ',' delimiter at column 1\); give a JSON"):
        read_json(tmp_path / "c.json")


def test_limits_of_size_hold_for_packed_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_spec.reading.MAX_FILE_BYTES", 1000)
    monkeypatch.setattr("twotower_spec.reading.MAX_LINE_BYTES", 100)
    for name, data, reason in (
        ("a.txt.gz", gzip.compress(b"x" * 101), "line 1 has more than 100 bytes"),
        ("b.txt", b"x\n" * 501, "more than 1000 bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileError, match=reason):
            list(read_rows(tmp_path / name))
    with pytest.raises(FileError, match="more than 1000 bytes"):
        read_text(tmp_path / "b.txt")
    assert read_text(Path("/dev/null")) == ""


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.json", "P.JSONL", "p.jsonl.gz"])
def test_one_notion_of_json_lines_holds_for_prompts_datasets_and_training(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / name, b'\xef\xbb\xbf{"text": "Once"}\r\n\r\n{"text": "upon"}'
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert holds_json_lines(path)
    assert [prompt.text for prompt in read_prompts([], [], path)] == ["Once", "upon"]
    assert sorted(prompt.text for prompt in load_prompts(path)) == ["Once", "upon"]
    assert list(user_texts([path])) == ["Once", "upon"]


@pytest.mark.parametrize("name", ["p.txt", "p.txt.gz"])
def test_plain_text_is_read_alike_too(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / name, b'\xef\xbb\xbf{"text": 1}\r\n\r\nupon'
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [prompt.text for prompt in read_prompts([], [], path)] == ['{"text": 1}', "upon"]
    assert {prompt.text for prompt in load_prompts(path)} == {'{"text": 1}', "upon"}
    assert list(user_texts([path])) == ['{"text": 1}\r\n\r\nupon']


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


@pytest.mark.parametrize("text", ["\ufeffOnce\nupon\n", '\ufeff{"text": "Once"}\n{"prompt": "upon"}\n'])
def test_dash_is_standard_input(stdin: Callable[[str], None], text: str, tmp_path: Path) -> None:
    stdin(text)
    assert [prompt.text for prompt in read_prompts([], [], STDIN)] == ["Once", "upon"]
    stdin(text)
    assert {prompt.prompt_id: prompt.text for prompt in load_prompts("-")} == {"stdin/0": "Once", "stdin/1": "upon"}


def test_training_keeps_standard_input_for_its_other_processes(stdin: Callable[[str], None], tmp_path: Path) -> None:
    stdin('{"text": "Once"}\n')
    (tmp_path / "a.txt").write_text("upon")
    texts = keep_standard_input([STDIN, tmp_path / "a.txt"], tmp_path / "out")
    assert [path.name for path in texts] == ["stdin.jsonl", "a.txt"]
    assert list(user_texts(texts)) == ["Once", "upon"]


def test_standard_input_is_generated_from_and_its_errors_name_it(
    command: Command,
    stdin: Callable[[str], None],
) -> None:
    stdin('{"token_ids": [5, 6]}\n')
    base = ("generate", "--model", checkpoint("T1"), "--max-new-tokens", "2", "--prompt-file", "-")
    assert command(*base)[0] == 0
    stdin("")
    assert command(*base)[0::2] == (2, "error: prompt file - holds no prompt; give at least one line\n")


@pytest.mark.parametrize("text", ["a\udcffb", "\ud800"])
def test_text_that_no_tokenizer_takes_is_refused_before_weights_are_read(
    text: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twotower_spec.model.TwoTowerModel.from_pretrained", None)
    code, out, err = command("generate", "--model", trio_path("twotower"), "fine", text)
    assert (code, out) == (2, "") and err.startswith("error: prompt 1 holds half of a surrogate pair")


def test_text_of_the_hub_that_no_tokenizer_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "fine"}, {"prompt": "a\ud800"}]
    monkeypatch.setattr("twotower_spec.evaluation.datasets._hub_rows", lambda *_: iter(rows))
    with pytest.raises(FileError, match="row 2 of owner/name holds half of a surrogate pair"):
        load_prompts("owner/name")


def test_recipe_of_a_bundled_name_only_is_looked_up_in_the_package(tmp_path: Path) -> None:
    """A name is not joined to the package's folder: `DIR/mine` is no way to write `DIR/mine.toml`."""
    shutil.copy(Path(__file__).parent / "training" / "miniature.toml", tmp_path / "mine.toml")
    with pytest.raises(FileError, match=r"mine cannot be read .* bundled recipe: trio, trio-gpu"):
        load_recipe(tmp_path / "mine")
    assert load_recipe(tmp_path / "mine.toml").two_tower
    assert read_toml(tmp_path / "mine.toml")["two_tower"]
