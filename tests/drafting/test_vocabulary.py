"""Tokenizers are compared by what ids mean."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from twotower_spec import ArgumentError
from twotower_spec.drafting import compare_vocabularies, shared_token_ids
from twotower_spec.training.tokenizer import train_tokenizer

TEXTS = ["def one(two): return three", "Question: how many apples are left? Answer: 12 apples."] * 3


def tokenizer(vocab_size: int = 300, texts: list[str] | None = None) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts or TEXTS, vocab_size)


def test_the_same_tokenizer_shares_every_row_that_both_tables_have() -> None:
    ours = tokenizer()
    assert shared_token_ids(ours, tokenizer(), 320, 300) == 300
    assert shared_token_ids(ours, tokenizer(), 300, 384) == 300


def test_a_tokenizer_that_goes_on_where_the_other_ends_is_no_mismatch() -> None:
    longer, shorter = tokenizer(300), tokenizer(280)
    assert shared_token_ids(longer, shorter, 300, 280) == 280
    assert shared_token_ids(shorter, longer, 320, 300) == 300


def test_other_tokens_are_refused_by_the_first_id_that_differs() -> None:
    ours, theirs = tokenizer(), tokenizer(texts=["zebra quartz jumps vex"] * 4 + TEXTS[:1])
    first = next(i for i in range(300) if ours.convert_ids_to_tokens(i) != theirs.convert_ids_to_tokens(i))
    with pytest.raises(ArgumentError, match=f"token id {first} is"):
        shared_token_ids(ours, theirs, 300, 300)


def test_special_tokens_are_compared_by_what_they_are() -> None:
    theirs = tokenizer()
    theirs.eos_token = theirs.pad_token  # ends its own texts with another id; all ids mean the same
    assert shared_token_ids(tokenizer(), theirs, 300, 300) == 300
    theirs = tokenizer()
    theirs.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    ours = tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<call>"]})
    count = len(theirs)
    with pytest.raises(ArgumentError, match=f"token id {count - 1} is '<call>' for the target and '<tool>'"):
        shared_token_ids(ours, theirs, count, count)


def test_every_id_that_differs_is_listed_and_missing_ones_are_not_compared() -> None:
    longer, shorter = tokenizer(300), tokenizer(280)
    comparison = compare_vocabularies(longer, shorter, 320, 300)
    assert (comparison.num_shared_ids, comparison.num_compared, comparison.differences) == (300, 280, ())
    other = tokenizer(texts=["zebra quartz jumps vex"] * 4 + TEXTS[:1])
    ours, theirs = (t.convert_ids_to_tokens(range(280)) for t in (longer, other))
    expected = [(i, mine, yours) for i, (mine, yours) in enumerate(zip(ours, theirs, strict=True)) if mine != yours]
    found = compare_vocabularies(longer, other, 280, 280).differences
    assert [(one.token_id, one.target, one.drafter) for one in found] == expected
