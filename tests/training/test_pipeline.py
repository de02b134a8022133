"""The whole training at toy size, through the command line: every stage, a kill, and a verifier of the user's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.support.command_line import Command
from twotower_spec import TwoTowerModel
from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.training.evaluation import Trio
from twotower_spec.training.loop import read_log
from twotower_spec.training.quality import TowerDrafter, VerifierText
from twotower_spec.training.tokenizer import train_tokenizer

MINIATURE = Path(__file__).with_name("miniature.toml")
COMMAND = [sys.executable, "-m", "twotower_spec.cli", "train"]
RUNS = ("verifier", "context", "context-distilled", "denoiser", "draft")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def train(*arguments: str | Path) -> str:
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def refusal(command: Command, *arguments: str | Path) -> str:
    code, out, error = command("train", *arguments)
    assert code == 2 and not out, error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    train("all", "--recipe", MINIATURE, "--output", folder, "--processes", "2", "--device", "cpu")
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_the_loss_of_every_stage_falls(finished: Path, run: str) -> None:
    entries = list(read_log(finished / "runs" / run / "log.jsonl"))
    assert [entry["step"] for entry in entries] == list(range(10, entries[-1]["step"] + 1, 10))
    # The distilled tower starts from the context tower; in its 20 steps of training the loss does not fall visibly.
    if run != "context-distilled":
        assert entries[0]["loss"] - entries[-1]["loss"] > 0.1
    assert (finished / "runs" / run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_verifier_and_draft_model_load_in_transformers_with_their_tokenizer(finished: Path) -> None:
    for name in ("verifier", "draft"):
        model = AutoModelForCausalLM.from_pretrained(finished / name)
        assert model.config.model_type == "qwen3" and model.dtype == torch.bfloat16
        assert model.config.vocab_size == 512 and model.generation_config.eos_token_id == 2
    tokenizer = load_tokenizer(finished / "twotower")
    assert tokenizer is not None and tokenizer.mask_token_id == 3
    ids = tokenizer("Mia has 12 pencils.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "Mia has 12 pencils."


def test_the_checkpoint_has_the_published_layout_and_the_frozen_context_tower(finished: Path) -> None:
    whole, context = (load_file(finished / name / "model.safetensors") for name in ("twotower", "context-distilled"))
    assert {name.split(".")[0] for name in whole} >= {"context_tower", "denoiser_tower", "lm_head", "t_embedder"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in whole.values())
    assert all(torch.equal(whole[name], tensor) for name, tensor in context.items())
    assert not torch.equal(
        whole["denoiser_tower.layers.0.mixer.in_proj.weight"], whole["context_tower.layers.0.mixer.in_proj.weight"]
    )
    config = json.loads((finished / "twotower" / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M*E" and "mask_token_id" not in config


def test_the_checkpoint_generates_and_drafts(finished: Path) -> None:
    model = TwoTowerModel.from_pretrained(finished / "twotower", dtype="float32")
    assert model.generate_mask_diffusion([[1, 60, 61]], 16, eos_token_id=2).num_new_tokens
    figures = finished / "evaluation.json"
    out = train(
        "evaluate", "--output", finished, "--json", figures, "--device", "cpu",
        "--prompts", "2", "--max-new-tokens", "12",
    )  # fmt: skip
    result = json.loads(figures.read_text())
    systems = {row["system"] for row in result["rows"]}
    assert systems >= {"TwoTower, 1 step, first token from context", "n-gram lookup", "AR draft model"}
    assert {row["category"] for row in result["rows"]} == {"maths", "python", "gsm8k", "standard library"}
    assert all(1 <= row["low"] <= row["acceptance_length"] <= row["high"] <= 16 for row in result["rows"])
    assert "acceptance length" in out
    for name in ("verifier", "twotower", "draft"):
        card = (finished / name / "README.md").read_text()
        assert "## Data" in card and "## Limits" in card and "n-gram lookup" in card
        assert "GSM8K" not in card  # not part of this recipe's corpus
        assert "--max-new-tokens 12" in card  # the command that was run


def test_a_finished_training_is_not_trained_again(finished: Path) -> None:
    before = (finished / "runs" / "verifier" / "log.jsonl").read_text()
    weights = (finished / "verifier" / "model.safetensors").read_bytes()
    train("verifier", "--recipe", MINIATURE, "--output", finished, "--device", "cpu")
    assert (finished / "runs" / "verifier" / "log.jsonl").read_text() == before
    assert (finished / "verifier" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("stage", "result"), [("context", "context"), ("denoiser", "twotower")])
def test_a_killed_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path, stage: str, result: str) -> None:
    for name in ("tokenizer", "corpus", "context-distilled"):
        (tmp_path / name).symlink_to(finished / name)
    if stage == "denoiser":
        (tmp_path / "verifier").symlink_to(finished / "verifier")
    options = ["--recipe", str(MINIATURE), "--output", str(tmp_path), "--device", "cpu"]
    arguments = [*COMMAND, stage, *options]
    checkpoint = tmp_path / "runs" / stage / "checkpoint.safetensors"
    killed = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.is_file():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / result).exists()
    train(stage, *options)
    assert (tmp_path / result / "model.safetensors").read_bytes() == (
        finished / result / "model.safetensors"
    ).read_bytes()
    steps = [entry["step"] for entry in read_log(tmp_path / "runs" / stage / "log.jsonl")]
    assert steps == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "nowhere"], "there is no verifier in nowhere"),
        (["--output", "{finished}", "--device", "cuda:7"], "device cuda:7 is not there"),
        (["--output", "{finished}", "--json", "nowhere/figures.json"], "the folder of --json nowhere"),
        (["--output", "{finished}", "--prompt-file", "{ids}"], "has prompts without text"),
        (["--output", "{finished}", "--prompt-file", "{a}", "--prompt-file", "{b}"], "two prompt files are named p"),
    ],
)
def test_bad_arguments_of_an_evaluation_are_one_sentence(
    finished: Path, tmp_path: Path, command: Command, arguments: list[str], message: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text("Question\n")
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"token_ids": [5, 6]}\n')
    places = {"finished": finished, "ids": ids, "a": tmp_path / "a" / "p.txt", "b": tmp_path / "b" / "p.txt"}
    error = refusal(command, "evaluate", *[argument.format(**places) for argument in arguments])
    assert message in error and "Traceback" not in error


def test_another_recipe_does_not_go_on_with_the_checkpoint(finished: Path, tmp_path: Path, command: Command) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(MINIATURE.read_text().replace("steps = 60", "steps = 61"))
    error = refusal(command, "verifier", "--recipe", recipe, "--output", finished)
    assert "was made with another recipe or other data; give another --output" in error


def test_a_stage_whose_input_is_missing_names_the_stage_to_run(tmp_path: Path, command: Command) -> None:
    error = refusal(command, "denoiser", "--recipe", MINIATURE, "--output", tmp_path)
    assert "run `twotower-spec train tokenizer` first" in error


def foreign_verifier(folder: Path) -> Path:
    """Verifier with a vocabulary of its own and no mask token, as a user may bring it."""
    tokenizer = train_tokenizer(["to be or not to be", "that is the question"], vocab_size=290)
    stripped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    stripped.save_pretrained(folder)
    return folder


def test_towers_for_a_verifier_of_the_users_own_share_its_tokenizer(tmp_path: Path) -> None:
    verifier = foreign_verifier(tmp_path / "mine")
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 60)
    (tmp_path / "b.jsonl").write_text('{"text": "Whether it is nobler in the mind to suffer."}\n' * 60)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(MINIATURE.read_text().replace("steps = 60", "steps = 10").replace("steps = 20", "steps = 10"))
    train(
        "all", "--recipe", recipe, "--output", tmp_path / "out", "--verifier", verifier,
        "--text", tmp_path / "a.txt", tmp_path / "b.jsonl",
    )  # fmt: skip
    model = TwoTowerModel.from_pretrained(tmp_path / "out" / "twotower", dtype="float32")
    # The verifier has 320 rows; the mask token, which its tokenizer lacks, is one more.
    assert (model.config.vocab_size, model.config.mask_token_id) == (321, 320)
    mine, theirs = load_tokenizer(verifier), load_tokenizer(tmp_path / "out" / "twotower")
    assert mine is not None and theirs is not None and mine.get_vocab() == theirs.get_vocab()
    assert not (tmp_path / "out" / "verifier").exists() and not (tmp_path / "out" / "tokenizer").exists()
    assert max(model.generate_mask_diffusion([[5, 6, 7]], 16).token_ids[0]) < 320
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("To be\nWhether it is\n")
    out = train(
        "evaluate", "--output", tmp_path / "out", "--verifier", verifier, "--prompt-file", prompts,
        "--max-new-tokens", "12", "--device", "cpu",
    )  # fmt: skip
    assert "prompts" in out
    card = (tmp_path / "out" / "twotower" / "README.md").read_text()
    assert "a.txt, b.jsonl" in card and "license" not in card
    trio = Trio(tmp_path / "out", verifier)
    for system in trio.systems():
        drafter = system.make([VerifierText([5, 6, 7], [8, 9])])
        if isinstance(drafter, TowerDrafter):
            assert max(drafter.draft({0: [5, 6, 7]}, 16)[0]) < 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verifier", "nowhere"], "verifier nowhere has no config.json"),
        (["--text", "nothing.txt"], "text file nothing.txt is not there"),
        (["--device", "tpu"], "device 'tpu' is not a device name"),
        (["--device", "cuda:7"], "device cuda:7 is not there"),
        (["--recipe", "none.toml"], "recipe none.toml cannot be read"),
        (["--recipe", "{no_verifier}"], "the recipe has no section [verifier]"),
    ],
)
def test_bad_arguments_are_one_sentence_before_anything_is_made(
    tmp_path: Path, command: Command, arguments: list[str], message: str
) -> None:
    text = MINIATURE.read_text()
    no_verifier = tmp_path / "recipe.toml"
    no_verifier.write_text(text[: text.index("[verifier.model]")] + text[text.index("[two_tower]") :])
    arguments = [argument.format(no_verifier=no_verifier) for argument in arguments]
    error = refusal(command, "context", "--output", tmp_path / "out", *arguments)
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out" / "runs").exists()
