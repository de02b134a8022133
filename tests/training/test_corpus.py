"""The corpus is right and deterministic, and holds nothing of the held-out prompts."""

import ast
import keyword
import operator
import re
import sys
from pathlib import Path
from random import Random

import pytest

from twotower_spec.demo import held_out_prompts
from twotower_spec.demo.trio import Category
from twotower_spec.training.corpus import maths, python_code, standard_library, training_documents
from twotower_spec.training.corpus.arithmetic import arithmetic_documents
from twotower_spec.training.corpus.generated import DOMAINS, held_out_templates, training_templates, version
from twotower_spec.training.corpus.real_text import gsm8k_train, is_held_out, word_problem
from twotower_spec.training.corpus.slots import HELD_OUT_SHARE, Slots, Template
from twotower_spec.training.corpus.words import other_words
from twotower_spec.training.held_out import trained_prompts
from twotower_spec.training.recipe import BUNDLED_RECIPES, load_recipe
from twotower_spec.training.tokenizer import train_tokenizer

# Another Python has another standard library, in which an excerpt may have moved to a file that is trained on.
TRAINED_WITH = (3, 11)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("template", maths.TEMPLATES, ids=lambda template: template.__name__)
def test_word_problems_are_solved_right(template: Template, held_out: bool) -> None:
    for seed in range(30):
        document = template(Slots(Random(seed), held_out))
        calculations = CALCULATION.findall(document.completion)
        assert calculations
        for left, sign, right, result in calculations:
            assert OPERATORS[sign](int(left), int(right)) == int(result) > 0
        assert f"The answer is {calculations[-1][3]} " in document.completion
        assert document.prompt.startswith("Question: ") and document.prompt.endswith("\nAnswer:")


def test_calculations_are_right_and_of_every_kind() -> None:
    text = "".join(arithmetic_documents(200, seed=1))
    calculations = CALCULATION.findall(text)
    assert len(calculations) == 2400 and {sign for _, sign, _, _ in calculations} == set("+-*/")
    assert all(OPERATORS[sign](int(a), int(b)) == int(result) > 0 for a, sign, b, result in calculations)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("template", python_code.TEMPLATES, ids=lambda template: template.__name__)
def test_generated_modules_are_python_and_follow_from_their_prompt(template: Template, held_out: bool) -> None:
    completions: dict[str, str] = {}
    for seed in range(20):
        document = template(Slots(Random(seed), held_out))
        ast.parse(document.text)
        assert completions.setdefault(document.prompt, document.completion) == document.completion


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_60_to_100_templates_and_some_are_held_out(domain: str) -> None:
    names = [template.__name__ for template in DOMAINS[domain].TEMPLATES]
    assert 60 <= len(names) == len(set(names)) <= 100
    assert len(held_out_templates(domain)) >= 8
    assert len(held_out_templates(domain)) + len(training_templates(domain)) == len(names)


def test_document_i_depends_on_seed_and_i_alone() -> None:
    few, many = (list(training_documents("maths", count, seed=5)) for count in (10, 30))
    assert many[:10] == few
    assert list(training_documents("maths", 10, seed=6)) != few


def test_held_out_values_and_trained_values_share_nothing() -> None:
    pool = tuple(range(50))
    trained = {Slots(Random(seed)).pick(pool) for seed in range(500)}
    held_out = {Slots(Random(seed), held_out=True).pick(pool) for seed in range(500)}
    assert trained | held_out == set(pool) and not trained & held_out
    assert len(held_out) == len(pool) // HELD_OUT_SHARE


def test_the_version_of_the_corpus_changes_with_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = version()
    changed = tmp_path / "maths.py"
    changed.write_bytes(Path(str(maths.__file__)).read_bytes() + b"#")
    monkeypatch.setattr(maths, "__file__", str(changed))
    assert version() != before


def test_a_share_of_trained_words_is_other_than_the_pools() -> None:
    pool, other = tuple(f"word{letter}s" for letter in "abcdefghijklmnopqrst"), tuple(f"new{i}" for i in range(300))
    picks = [Slots(Random(seed), other_words=other).pick(pool) for seed in range(400)]
    assert 80 < sum(word not in pool for word in picks) < 200
    assert all(word.endswith("s") and not word.endswith("ss") for word in picks)
    pairs = (("box", "boxes"), ("pen", "pens"), ("man", "men"), (3, "x"), ("cat", "cats"))
    made = {Slots(Random(seed), other_words=other).pick(pairs) for seed in range(300)}
    assert {("man", "men"), (3, "x")} < made
    assert {many.removeprefix(str(one)) for one, many in made if str(one).startswith("new")} == {"es", "s"}


def test_other_words_are_usable_names_and_leave_out_what_is_held_out() -> None:
    words = other_words(["Table", "spoons"])
    assert len(words) > 5000
    assert all(word.isidentifier() and not keyword.iskeyword(word) for word in words)
    assert not {"table", "spoons", "print", "list"} & set(words) and "apples" in words


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_prompt_has_the_tokens_that_it_has_in_its_document(domain: str) -> None:
    """Prompt and completion meet between two tokens, so that training saw the prompt's last token there."""
    texts = [document.text for document in training_documents(domain, 300, seed=1)]
    tokenizer = train_tokenizer(texts, vocab_size=800)
    for document in training_documents(domain, 300, seed=0):
        prompt, completion = tokenizer(document.prompt), tokenizer(document.completion, add_special_tokens=False)
        assert prompt["input_ids"] + completion["input_ids"] == tokenizer(document.text)["input_ids"]


def test_gsm8k_has_its_rows_without_calculator_marks() -> None:
    documents = list(gsm8k_train())
    assert len(documents) == 7473
    assert not any("<<" in text or "####" in text for text in documents)
    question, answer = word_problem({"question": "Q?", "answer": "A <<1+1=2>>2.\n#### 2"})
    assert question + answer == "Question: Q?\nAnswer: A 2.\nThe answer is 2.\n"


def test_the_standard_library_is_divided_by_file() -> None:
    trained, held_out = dict(standard_library()), dict(standard_library(held_out=True))
    assert len(trained) > 300 and len(held_out) >= 10
    assert not set(trained) & set(held_out)
    assert all(is_held_out(name) for name in held_out) and not any(is_held_out(name) for name in trained)
    assert not any("/test/" in f"/{name}" for name in trained)


@pytest.mark.parametrize("recipe", BUNDLED_RECIPES)
@pytest.mark.parametrize("category", ["maths", "python"])
def test_generated_held_out_prompts_were_never_trained_on(category: Category, recipe: str) -> None:
    trained = trained_prompts(category, load_recipe(Path(recipe)))
    assert len(trained) > 10000
    rows = held_out_prompts(category)
    assert {row.source for row in rows} == {template.__name__ for template in DOMAINS[category].TEMPLATES}
    assert {row.held_out for row in rows} == {"template", "values", "seed"}
    assert not trained & {row.prompt for row in rows}
    unseen = {template.__name__ for template in held_out_templates(category)}
    assert all((row.source in unseen) == (row.held_out == "template") for row in rows)


@pytest.mark.parametrize("category", ["maths", "python"])
def test_held_out_values_are_in_no_training_document(category: Category) -> None:
    """Every prompt held out by its values has a word that no training document of the domain has."""
    text = " ".join(document.text for document in training_documents(category, 20000, load_recipe(None).seed))
    trained_words = set(re.findall(r"[a-z]+", text.lower()))
    for row in held_out_prompts(category):
        if row.held_out == "values":
            assert set(re.findall(r"[a-z]+", row.prompt.lower())) - trained_words, row.prompt


def test_real_held_out_prompts_come_from_the_test_split_and_held_out_files() -> None:
    trained = set(gsm8k_train())
    library = "".join(text for _, text in standard_library()) if sys.version_info[:2] == TRAINED_WITH else ""
    for row in held_out_prompts("real"):
        if row.held_out == "split":
            assert not any(text.startswith(row.prompt) for text in trained)
        else:
            assert is_held_out(row.source.partition(":")[0])
            assert row.prompt not in library
