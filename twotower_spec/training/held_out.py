"""Held-out prompt files in three categories, none of which was ever trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from twotower_spec.reading import read_json_lines
from twotower_spec.training.corpus import HeldOut, standard_library, training_documents
from twotower_spec.training.corpus.generated import held_out_draws, held_out_templates, training_templates
from twotower_spec.training.corpus.real_text import word_problem
from twotower_spec.training.recipe import BUNDLED_RECIPES, Recipe, load_recipe
from twotower_spec.training.sampling import FRESH_SEED

# Differs from the seeds of recipes, with which training documents are drawn.
SEED = 20_261_124
MOST_DRAWS = 1000
EXCERPT_LINES = 8
EXCERPT_CHARACTERS = (160, 400)


def generated_prompts(domain: str, recipes: Sequence[Recipe]) -> Iterator[dict[str, Any]]:
    """One prompt per template of a domain: held-out templates, then trained ones, by values and by seed in turn.

    A draw that also occurs in the training of one of the recipes is skipped.
    """
    trained: set[str] = set().union(*(trained_prompts(domain, recipe) for recipe in recipes))
    parts = itertools.cycle((HeldOut.VALUES, HeldOut.SEED))
    chosen = [(template, HeldOut.TEMPLATE) for template in held_out_templates(domain)]
    chosen += zip(training_templates(domain), parts, strict=False)
    for template, wanted in chosen:
        # Training may have made every draw of trained values that a template of few words has.
        for part in dict.fromkeys((wanted, HeldOut.VALUES)):
            draws = itertools.islice(held_out_draws(domain, template, part, SEED), MOST_DRAWS)
            prompt = next((draw.prompt for draw in draws if draw.prompt not in trained), None)
            if prompt is not None:
                yield {"prompt": prompt, "held_out": str(part), "source": template.__name__}
                break


def trained_prompts(domain: str, recipe: Recipe) -> set[str]:
    """Beginnings of all generated documents that a recipe trains on, the verifier's samples included."""
    sampled = recipe.distill.sampling.documents.get(domain, 0) if recipe.distill else 0
    draws = ((getattr(recipe.corpus, domain), recipe.seed), (sampled, recipe.seed + FRESH_SEED))
    return {document.prompt for count, seed in draws for document in training_documents(domain, count, seed)}


def gsm8k_prompts(test_file: Path, count: int) -> Iterator[dict[str, Any]]:
    """Questions of GSM8K's test split (MIT licence), evenly spread over the file."""
    rows = [row for _, row in read_json_lines(test_file)]
    for index in range(0, len(rows) // count * count, len(rows) // count):
        question, _ = word_problem(rows[index])
        yield {"prompt": question, "held_out": "split", "source": f"gsm8k test {index}"}


def standard_library_prompts(count: int) -> Iterator[dict[str, Any]]:
    """Beginnings of definitions in held-out modules of Python's standard library (PSF licence)."""
    rng = Random(SEED)
    excerpts = []
    for name, text in standard_library(held_out=True):
        lines = text.splitlines(keepends=True)
        for number in [i for i, line in enumerate(lines) if line.lstrip().startswith(("def ", "class "))]:
            excerpt = "".join(lines[number : number + EXCERPT_LINES]).rstrip()
            if EXCERPT_CHARACTERS[0] <= len(excerpt) <= EXCERPT_CHARACTERS[1]:
                excerpts.append({"prompt": excerpt, "held_out": "file", "source": f"{name}:{number + 1}"})
    yield from sorted(rng.sample(excerpts, count), key=lambda row: str(row["source"]))


def write_held_out_prompts(directory: Path, gsm8k_test: Path, real: int = 36) -> None:
    """Writes maths.jsonl, python.jsonl and real.jsonl, without anything that a bundled recipe trains on.

    Args:
        directory: where to.
        gsm8k_test: GSM8K's test split as published, JSON lines.
        real: prompts of each of the two real texts.
    """
    recipes = [load_recipe(Path(name)) for name in BUNDLED_RECIPES]
    categories = {
        "maths": list(generated_prompts("maths", recipes)),
        "python": list(generated_prompts("python", recipes)),
        "real": [*gsm8k_prompts(gsm8k_test, real), *standard_library_prompts(real)],
    }
    for name, rows in categories.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
