"""Arithmetic and intervals of the benchmark of fewer bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.bench_fewer_bytes import HELD, WAYS, Way, change, length_of
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec.towers.layers import MixtureOfExperts
from twotower_spec.training.quality import Acceptance

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("count", range(1, PUBLISHED_SIZE.num_experts_per_tok + 1))
def test_the_documented_bytes_follow_from_the_published_shape(count: int) -> None:
    (line,) = re.findall(rf"^\| {count} (\|(?: \d+\.\d \|){{12}})$", PAGE.read_text(), flags=re.M)
    expected = [
        Way("", size, experts_dtype=held, denoiser_experts=count / 6).bytes_of_round(batch, 4) / 1e9
        for held in HELD
        for size, batch in ((16, 1), (8, 1), (4, 1), (16, 8))
    ]
    assert re.findall(r"\d+\.\d", line) == [f"{value:.1f}" for value in expected]


def test_half_the_experts_are_one_of_the_trios_two() -> None:
    (way,) = (way for way in WAYS if way.name == "half the experts, denoiser")
    towers = way.towers()
    for tower, expected in ((towers.context, 2), (towers.denoiser, 1)):
        mixers = [layer.mixer for layer in tower.layers if isinstance(layer.mixer, MixtureOfExperts)]
        assert mixers and {mixer.choice.top_k for mixer in mixers} == {expected}


def test_changes_on_the_same_prompts_leave_out_how_prompts_differ() -> None:
    steps = [10, 20, 30, 5, 17]
    base = Acceptance([count * length for count, length in zip(steps, (2, 3, 5, 9, 1), strict=True)], steps, [], 0)
    worse = Acceptance([9 * tokens for tokens in base.tokens], [10 * count for count in steps], [], 0)
    assert length_of([worse]) == pytest.approx(0.9 * length_of([base]))
    paired, apart = (change([worse], [base], is_paired=one) for one in (True, False))
    assert (paired.value, paired.low, paired.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert apart.value == paired.value and apart.low < -0.3 and apart.high > 0.2
