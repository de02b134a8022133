"""Batches are a function of seed and step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from twotower_spec.errors import ArgumentError
from twotower_spec.training.streams import Mixture, TokenStream


def stream(first: int, documents: int = 40, length: int = 17) -> TokenStream:
    return TokenStream.from_documents([list(range(first + i, first + i + length)) for i in range(documents)])


def mixture(seed: int = 0, **weights: float) -> Mixture:
    streams = {"low": stream(0), "high": stream(1000)}
    return Mixture(streams, weights or {"low": 1.0, "high": 1.0}, sequence_length=32, batch_size=5, seed=seed)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    assert torch.equal(mixture().batch(7), mixture().batch(7))
    assert not torch.equal(mixture().batch(7), mixture().batch(8))
    assert not torch.equal(mixture().batch(7), mixture(seed=1).batch(7))


def test_rows_begin_at_documents_and_run_on_into_the_next() -> None:
    source = stream(0)
    for row in mixture(low=1.0).batch(0):
        start = next(s for s in source.starts if source.tokens[s] == row[0])
        assert row.tolist() == source.tokens[start : start + 33].tolist()


def test_sources_are_drawn_by_weight() -> None:
    draws = mixture(low=3.0, high=1.0)
    rows = torch.cat([draws.batch(step) for step in range(400)])
    # 2000 draws at 1/4: standard deviation 0.0097, bound 5 of them.
    assert abs(float((rows[:, 0] >= 1000).float().mean()) - 0.25) < 0.05


def test_long_documents_may_be_entered_inside() -> None:
    joined = TokenStream.from_documents([list(range(2000)), [5, 6]], max_row=512)
    assert joined.starts[0] == 0 and joined.starts[-1] == 2000
    assert 256 in joined.starts and all(s <= 2000 for s in joined.starts)


def test_a_stream_survives_saving(tmp_path: Path) -> None:
    place = tmp_path / "corpus" / "low"
    assert not TokenStream.is_saved(place)
    stream(3).save(place)
    loaded = TokenStream.load(place)
    assert TokenStream.is_saved(place)
    stream(9).save(tmp_path / "taken")
    stream(3).save(tmp_path / "taken")  # as another process may, with the same content
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert np.array_equal(loaded.tokens, stream(3).tokens) and np.array_equal(loaded.starts, stream(3).starts)


def test_a_missing_or_short_source_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="'music' is not there"):
        Mixture({"low": stream(0)}, {"music": 1.0}, 32, 5, 0)
    with pytest.raises(ArgumentError, match="'low' has 17 tokens, fewer than one row of 33"):
        Mixture({"low": stream(0, documents=1)}, {"low": 1.0}, 32, 5, 0)
