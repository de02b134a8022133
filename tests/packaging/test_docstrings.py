import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A first sentence that begins so depends on the name above it, and is read twice.
REFUSED = {"Of", "That", "As", "From", "By", "What"}
# Its sources are the corpus's version: with another docstring there it would be another corpus.
EXEMPT = ROOT / "twotower_spec" / "training" / "corpus"
FOLDERS = ("benchmarks", "examples", "kernels", "tests", "twotower_spec", "vllm_plugin")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: Path) -> Iterator[tuple[str, str]]:
    """Docstrings of a file, each with its place."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield f"{source.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def test_a_first_sentence_begins_with_a_verb_or_the_noun_it_describes() -> None:
    refused = [
        f"{place}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for source in sorted((ROOT / folder).rglob("*.py"))
        if not source.is_relative_to(EXEMPT)
        for place, text in docstrings(source)
        if text.split()[0].strip(",:;.") in REFUSED
    ]
    assert refused == []
