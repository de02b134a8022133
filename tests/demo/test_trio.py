"""The bundled trio matches its model cards, and is good enough for a demonstration."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.vllm_plugin.fork_server import results_of
from twotower_spec import TwoTowerConfig
from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.demo import held_out_prompts, trio_directory, trio_path
from twotower_spec.demo.trio import Category
from twotower_spec.training.evaluation import Trio
from twotower_spec.training.quality import VerifierText, measure_acceptance, repeated_4gram_fraction, write_texts

MODELS = ("verifier", "twotower", "draft")
MOST_BYTES = 80_000_000


def num_parameters(model: str, prefix: str = "") -> int:
    with safe_open(trio_path(model) / "model.safetensors", "pt") as stored:  # type: ignore[arg-type]
        names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
        return sum(torch.Size(stored.get_slice(name).get_shape()).numel() for name in names)


@cache
def trio() -> Trio:
    return Trio(trio_directory())


@cache
def greedy_texts(category: Category) -> list[VerifierText]:
    prompts = trio().tokenizer([row.prompt for row in held_out_prompts(category)])["input_ids"]
    return write_texts(trio().verifier, [list(ids) for ids in prompts], 128, 0.0, [2])


def test_everything_bundled_fits_in_80_megabytes() -> None:
    assert sum(file.stat().st_size for file in trio_directory().rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_bfloat16_safetensors_with_tokenizer_and_card(model: str) -> None:
    path = trio_path(model)  # type: ignore[arg-type]
    with safe_open(path / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
    assert not [file for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".py"}]
    card = (path / "README.md").read_text()
    for section in ("## Data", "## Recipe", "## Metrics", "## Limits", "license: apache-2.0", "commit"):
        assert section in card


def test_sizes_are_those_of_a_drafter_and_its_larger_verifier() -> None:
    verifier, draft = num_parameters("verifier"), num_parameters("draft")
    tower = num_parameters("twotower", "context_tower") + num_parameters("twotower", "context_lm_head")
    assert 20e6 <= verifier <= 30e6
    assert verifier >= 4 * tower
    assert 0.8 <= draft / tower <= 1.25


def test_the_checkpoint_has_all_layer_kinds_and_the_published_fields() -> None:
    config = TwoTowerConfig.from_pretrained(trio_path("twotower"))
    assert set(config.layer_kinds) == {"M", "E", "*"} and config.mask_token_id == 3
    fields = json.loads((trio_path("twotower") / "config.json").read_text())
    assert {"hybrid_override_pattern", "mamba_num_heads", "n_routed_experts", "ssm_state_size"} <= set(fields)


def test_all_models_share_one_tokenizer_with_single_digits() -> None:
    tokenizers = [load_tokenizer(trio_path(model)) for model in MODELS]  # type: ignore[arg-type]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers if tokenizer]
    assert len(vocabularies) == 3 and vocabularies[0] == vocabularies[1] == vocabularies[2]
    tokenizer = tokenizers[0]
    assert tokenizer is not None and len(tokenizer) == 2048
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert ids == [0, 1, 2, 3]
    assert [token for token in vocabularies[0] if re.search(r"\d\d", token)] == []
    text = 'Ünïcode "quotes",\n\ttabs — and 1234 digits ✓'
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_verifier_solves_held_out_word_problems() -> None:
    """Most calculations that it writes are right: its text is worth preserving."""
    text = " ".join(trio().tokenizer.decode(t.text, skip_special_tokens=True) for t in greedy_texts("maths"))
    calculations = re.findall(r"(\d+ [-+*] \d+) = (\d+)", text)
    right = sum(eval(expression) == int(result) for expression, result in calculations)
    assert len(calculations) >= 60 and right / len(calculations) >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("category", "system", "least"),
    [
        ("maths", "TwoTower, 1 step, first token from context", 3.2),
        ("python", "TwoTower, 1 step, first token from context", 4.5),
    ],
)
def test_one_denoising_step_is_accepted_often_enough(category: Category, system: str, least: float) -> None:
    chosen = next(s for s in trio().systems() if s.name == system)
    assert chosen.num_tokens == 7
    texts = greedy_texts(category)
    assert measure_acceptance(chosen.make(texts), texts, 7).length >= least
    assert repeated_4gram_fraction(texts) < 0.1


@pytest.mark.slow
def test_the_verifier_loads_in_vllm_and_writes_what_transformers_writes() -> None:
    prompts = json.dumps([row.prompt for row in held_out_prompts("maths")[:4]])
    written, _ = results_of(f"{__name__}:write_tokens", prompts)
    assert written == [text.text[:40] for text in greedy_texts("maths")[:4]]


def write_tokens(prompts: str, output: str) -> None:
    """Runs vLLM in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(trio_path("verifier")), dtype="float32", max_model_len=512, enforce_eager=True)
    rows = llm.generate(json.loads(prompts), SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    Path(output).write_text(json.dumps([list(row.outputs[0].token_ids) for row in rows]))
