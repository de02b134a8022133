import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from twotower_spec.demo import held_out_prompts
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import DATASETS, load_prompts

SPEC_BENCH_ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 161, "category": "translation", "turns": ["Translate German to English: Guten Tag"]},
    {"question_id": 241, "category": "summarization", "turns": ["Summarize: it rained."]},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("dataset", "count"),
    [("trio", 216), ("gsm8k", 1319), ("humaneval", 164), ("mbpp", 500), ("mt-bench", 80), ("spec-bench", 160)],
)
def test_bundled_dataset_is_whole_and_its_ids_are_unique(dataset: str, count: int) -> None:
    prompts = load_prompts(dataset)
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == count
    assert all(prompt.text.strip() and prompt.turns and prompt.category for prompt in prompts)
    assert all(prompt.prompt_id.startswith(f"{dataset}/") for prompt in prompts)


def test_the_default_is_the_held_out_prompts_of_the_trio() -> None:
    assert {prompt.text for prompt in load_prompts(categories=["python"])} == {
        row.prompt for row in held_out_prompts("python")
    }


def test_rows_that_may_not_be_shipped_are_not_in_the_package() -> None:
    assert Counter(prompt.category for prompt in load_prompts("spec-bench")) == {"multi-turn": 80, "math_reasoning": 80}


@pytest.mark.parametrize("category", ["translation", "summarization", "qa", "rag"])
def test_asking_for_spec_bench_rows_that_are_not_shipped_says_where_they_are(category: str) -> None:
    with pytest.raises(ArgumentError, match=rf"no category {category}.*spec-bench=question.jsonl"):
        load_prompts("spec-bench", [category])


def test_the_full_spec_bench_file_is_read_with_its_own_categories(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "question.jsonl", SPEC_BENCH_ROWS)
    prompts = {prompt.prompt_id: prompt for prompt in load_prompts(f"spec-bench={path}")}
    assert prompts["spec-bench/81"].category == "multi-turn"
    assert prompts["spec-bench/81"].turns == ("Write.", "Again.")
    assert prompts["spec-bench/161"].category == "translation"
    assert prompts["spec-bench/241"].text == "Question: Summarize: it rained.\nAnswer:"


def test_prompts_are_framed_so_that_a_base_model_can_continue_them() -> None:
    gsm8k = {prompt.prompt_id: prompt for prompt in load_prompts("gsm8k")}["gsm8k/0"]
    assert gsm8k.text == f"Question: {gsm8k.turns[0]}\nAnswer:"
    assert gsm8k.text == held_out_prompts("real")[0].prompt  # the trio's frame
    humaneval = {prompt.prompt_id: prompt for prompt in load_prompts("humaneval")}["humaneval/0"]
    assert humaneval.text.endswith('"""\n')
    mbpp = {prompt.prompt_id: prompt for prompt in load_prompts("mbpp")}["mbpp/11"]
    assert mbpp.text == (
        '"""\nWrite a python function to remove first and last occurrence of a given character from the string.\n'
        'assert remove_Occ("hello","l") == "heo"\n"""\n'
    )
    mt_bench = {prompt.prompt_id: prompt for prompt in load_prompts("mt-bench")}["mt-bench/81"]
    assert mt_bench.category == "writing" and len(mt_bench.turns) == 2
    assert mt_bench.text == f"Question: {mt_bench.turns[0]}\nAnswer:"


def test_mbpp_is_read_with_the_field_names_of_its_authors_too(tmp_path: Path) -> None:
    row = {"task_id": 2, "text": "Add.", "code": "def add(): ...", "test_list": ["assert add(1, 2) == 3", "assert 1"]}
    [prompt] = load_prompts(f"mbpp={write_rows(tmp_path / 'mbpp.jsonl', [row])}")
    assert (prompt.prompt_id, prompt.text) == ("mbpp/2", '"""\nAdd.\nassert add(1, 2) == 3\n"""\n')


@pytest.mark.parametrize("limit", [1, 3, 8, 17, 160])
def test_a_limit_is_balanced_over_categories_and_the_beginning_of_a_larger_one(limit: int) -> None:
    prompts = load_prompts("mt-bench", limit=limit, seed=5)
    counts = Counter(prompt.category for prompt in prompts)
    assert len(prompts) == min(limit, 80)
    assert len(counts) == min(limit, 8) and max(counts.values()) - min(counts.values()) <= 1
    assert prompts == load_prompts("mt-bench", seed=5)[:limit]


def test_choosing_categories_leaves_their_prompts_as_they_were() -> None:
    every = load_prompts("trio", limit=30, seed=3)
    maths = load_prompts("trio", ["maths"], limit=10, seed=3)
    assert maths == [prompt for prompt in every if prompt.category == "maths"]
    assert load_prompts("trio", ["real", "maths"], seed=3) == load_prompts("trio", ["maths", "real"], seed=3)


def test_a_seed_gives_the_same_prompts_always_and_another_seed_gives_others() -> None:
    def ids(seed: int) -> list[str]:
        return [prompt.prompt_id for prompt in load_prompts("gsm8k", limit=5, seed=seed)]

    # Fixed here, so that a benchmark can be repeated with a later version.
    assert ids(0) == ["gsm8k/213", "gsm8k/962", "gsm8k/963", "gsm8k/864", "gsm8k/257"]
    assert ids(0) != ids(1)


def test_a_category_that_runs_out_leaves_its_places_to_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "category": "few" if i < 1 else "many"} for i in range(7)]
    prompts = load_prompts(write_rows(tmp_path / "x.jsonl", rows), limit=5)
    assert Counter(prompt.category for prompt in prompts) == {"few": 1, "many": 4}


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz"])
def test_a_jsonl_file_gives_its_prompts_as_they_are(tmp_path: Path, name: str) -> None:
    lines = [
        {"prompt": " def f():\u2028\n", "id": "a", "category": "code"},
        {"text": "Once"},
        {"turns": ["One?", "Two?"]},
    ]
    data = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    prompts = {prompt.prompt_id: prompt for prompt in load_prompts(path)}
    assert set(prompts) == {"own/a", "own/1", "own/2"}
    assert (prompts["own/a"].text, prompts["own/a"].category) == (" def f():\u2028\n", "code")
    assert (prompts["own/1"].text, prompts["own/1"].category) == ("Once", "own")
    assert (prompts["own/2"].text, prompts["own/2"].turns) == ("One?", ("One?", "Two?"))


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("  indented\r\n\r\nzwei \u2028 Wörter\nlast".encode())
    prompts = sorted(load_prompts(str(path)), key=lambda prompt: prompt.prompt_id)
    assert [prompt.text for prompt in prompts] == ["  indented", "zwei \u2028 Wörter", "last"]
    assert [prompt.prompt_id for prompt in prompts] == ["lines/0", "lines/1", "lines/2"]


def test_names_of_datasets_may_be_written_as_their_authors_do() -> None:
    assert load_prompts("MT_Bench", limit=3) == load_prompts("mt-bench", limit=3)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1 is no JSON object"),
        ("a.jsonl", b'{"question": "x", "n": 1}\n', "no text in prompt or text or turns, only the fields question, n"),
        ("a.jsonl", b'{"prompt": "  "}\n', "row 1 of .* has no text"),
        ("a.jsonl", b'{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}\n', "two prompts with id 1"),
        ("a.jsonl", b"\n \n", "has no prompts"),
        ("a.txt", b"\xff\xfe\n", "cannot be read"),
        ("a.txt.gz", b"plain text", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-12], "cannot be read"),
        ("a.csv", b"prompt\nx\n", "ends in .csv"),
        ("a", b"x\n", "ends in no suffix"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ArgumentError, match=message):
        load_prompts(path)


def test_a_file_in_another_format_is_refused_with_the_field_that_is_missing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(ArgumentError, match="no text in question, only the fields prompt"):
        load_prompts(f"gsm8k={path}")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("gsm9k", "unknown dataset: gsm9k; use one of trio, gsm8k"),
        ("gsm8k=nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("nowhere/at/all", "unknown dataset"),
        ("./prompts", "no such file"),
        ("some/prompts.txt", "no such file"),
    ],
)
def test_a_dataset_that_is_nowhere_is_refused_with_the_choices(dataset: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_prompts(dataset)


@pytest.mark.parametrize("categories", [["poems"], []])
def test_unknown_categories_are_refused_with_the_choices(categories: list[str]) -> None:
    with pytest.raises(ArgumentError, match=r"no category .*use one of: maths, python, real"):
        load_prompts("trio", categories)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ArgumentError, match="limit 0"):
        load_prompts("trio", limit=0)


def test_a_hub_dataset_without_its_package_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match="pip install datasets"):
        load_prompts("openai/gsm8k")


class FakeHub(ModuleType):
    """Stand-in for the package `datasets`, which can read no dataset without network."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> list[dict[str, str]]:
        self.asked.append((path, name, split))
        if split == "nowhere":
            raise ValueError('Unknown split "nowhere". Should be one of ["test"].\nmore')
        return [{"question": "How many?", "answer": "#### 3"}]


def test_a_hub_dataset_is_read_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    [prompt] = load_prompts("gsm8k=openai/gsm8k:main")
    assert (prompt.prompt_id, prompt.text) == ("gsm8k/0", "Question: How many?\nAnswer:")
    load_prompts("gsm8k=openai/gsm8k:main:train")
    assert hub.asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    with pytest.raises(ArgumentError, match=r'Unknown split "nowhere".*check owner/name:config:split'):
        load_prompts("gsm8k=openai/gsm8k:main:nowhere")


def test_every_dataset_has_a_format_or_is_the_trio() -> None:
    assert DATASETS == ("trio", "gsm8k", "humaneval", "mbpp", "mt-bench", "spec-bench")
