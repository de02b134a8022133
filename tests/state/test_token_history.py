"""Token histories, and their comparison with rows."""

import numpy as np
import pytest

from twotower_spec.state.token_history import FIRST_CAPACITY, TokenHistory, TokenSequence, tokens_from

LENGTHS = [0, 1, FIRST_CAPACITY - 1, FIRST_CAPACITY, FIRST_CAPACITY + 1, 1000]


def as_list(ids: list[int]) -> TokenSequence:
    return list(ids)


def as_table_row(ids: list[int]) -> TokenSequence:
    table = np.full((3, 2000), -7, dtype=np.int32)
    table[1, : len(ids)] = ids
    return table[1, : len(ids)]


def as_int64(ids: list[int]) -> TokenSequence:
    return np.array(ids, dtype=np.int64)


@pytest.mark.parametrize("make", [as_list, as_table_row, as_int64])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_is_continued_if_it_begins_with_every_token(length: int, make: object) -> None:
    history, ids = TokenHistory(), list(range(5, 5 + length))
    for start in range(0, length, 7):
        history.extend(ids[start : start + 7])
    assert len(history) == length and history.tolist() == ids
    assert callable(make)
    assert history.begins(make(ids)) and history.begins(make([*ids, 9, 9]))
    for position in {0, length // 2, length - 1} if length else set():
        changed = [*ids, 9]
        changed[position] += 1
        assert not history.begins(make(changed))
    assert not length or not history.begins(make(ids[:-1]))


def test_what_was_truncated_is_not_compared() -> None:
    history = TokenHistory()
    history.extend([5, 6, 7, 8])
    history.truncate(2)
    assert history.begins([5, 6, 9]) and history.tolist() == [5, 6]
    history.extend([9])
    assert history.tolist() == [5, 6, 9]


@pytest.mark.parametrize("make", [as_list, as_table_row])
def test_new_tokens_are_python_integers(make: object) -> None:
    assert callable(make)
    tokens = tokens_from(make([4, 5, 6]), 1)
    assert tokens == [5, 6] and all(type(token) is int for token in tokens)
