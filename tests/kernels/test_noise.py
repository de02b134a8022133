"""Counter-based noise: the hash, its independence from the batch, and its distribution."""

import math

import pytest
import torch
from scipy import stats

from twotower_kernels.noise import gumbel_argmax, gumbel_noise, op, reproducible_log, uniform_noise
from twotower_kernels.noise.reference import gumbel_noise_reference, uniform_noise_reference

SEEDS = [0, 1, -1, 2**31, 2**62 + 12345, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("position", "draw"), [(0, 0), (5, 0), (5, 3), (300000, 15)])
def test_noise_is_the_hash_of_its_counters(seed: int, position: int, draw: int) -> None:
    tokens = [*range(50), 63, 64, 65, 2047, 2048, 2049, 4500]
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), draw, 4501)[0, tokens]
    expected = [gumbel_noise_reference(seed, position, draw, token) for token in tokens]
    # Only the logarithms are rounded.
    torch.testing.assert_close(noise, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    uniform = uniform_noise(torch.tensor([seed]), torch.tensor([position]), draw, 5)[0].tolist()
    assert uniform == [uniform_noise_reference(seed, position, draw, index) for index in range(5)]


def test_the_logarithm_is_that_of_float64_within_two_units_in_the_last_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(100_000, generator=generator), 40 * torch.rand(100_000, generator=generator) + 1e-9])
    expected = x.double().log()
    # Relative to the result, also where it is close to 0.
    assert float(((reproducible_log(x).double() - expected) / expected).abs().max()) < 2**-22


def test_uniform_noise_is_strictly_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extreme hashes are too rare to occur by chance, so they are injected."""
    for bits in (-1, 0):  # all ones, all zeros
        monkeypatch.setattr(op, "_finalise", lambda h, bits=bits: torch.zeros_like(h) + bits if h.dim() > 1 else h)
        uniform = op.uniform_noise(torch.tensor([3]), torch.tensor([4]), 0, 5)
        assert float(uniform.min()) > 0 and float(uniform.max()) < 1
        assert op.gumbel_noise(torch.tensor([3]), torch.tensor([4]), 0, 5).isfinite().all()


def test_noise_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    seeds, positions = torch.tensor([7, 8]), torch.tensor([1, 2])
    assert gumbel_noise(seeds, positions, 0, 100).equal(gumbel_noise(seeds, positions, 0, 9000)[:, :100])


@pytest.mark.parametrize("vocab", [1, 5, 63, 300, 2048, 2049, 20_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_samples_are_the_argmax_of_scores_and_noise(vocab: int, spread: float, dtype: torch.dtype) -> None:
    scores = (spread * torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    scores[3, :: 2 if vocab > 1 else 1] = -torch.inf
    scores[4] = -torch.inf
    seeds, positions = torch.arange(5) * 2**40 - 2**41, torch.arange(5) * 17
    expected = (scores + gumbel_noise(seeds, positions, 2, vocab)).argmax(-1)
    assert gumbel_argmax(scores, seeds, positions, 2).equal(expected)


def test_undefined_and_infinite_scores_are_taken_as_argmax_does() -> None:
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[1.0, nan, inf, nan], [1.0, inf, -inf, inf], [nan] * 4, [-inf, -inf, 2.0, -inf]])
    seeds = torch.arange(4)
    expected = (scores + gumbel_noise(seeds, seeds, 0, 4)).argmax(-1)
    assert gumbel_argmax(scores, seeds, seeds).tolist() == expected.tolist() == [1, 1, 0, 2]


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    seeds, positions = torch.tensor([7, 8, 9]), torch.tensor([1, 2, 3])
    together = gumbel_noise(seeds, positions, 0, 100)
    for row in range(3):
        assert torch.equal(together[row], gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 0, 100)[0])


@pytest.mark.parametrize(("seed", "position", "draw"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0)])
def test_every_counter_changes_the_noise(seed: int, position: int, draw: int) -> None:
    zero = torch.tensor([0])
    changed = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), draw, 1000)
    correlation = torch.corrcoef(torch.cat([gumbel_noise(zero, zero, 0, 1000), changed]))[0, 1]
    assert abs(correlation.item()) < 0.15  # 1000 pairs: standard deviation 0.03


@pytest.mark.parametrize("tokens", [slice(0, 64), slice(0, 2048, 64), slice(1000, 2000)])
def test_noise_is_gumbel_distributed_and_so_are_the_maxima_of_groups(tokens: slice) -> None:
    """N and bound fixed beforehand: 2000 rows, p > 1e-4; for neighbouring tokens, in a group and across groups."""
    rows = torch.arange(2000)
    noise = gumbel_noise(rows, rows * 3, 0, 2048)[:, tokens].double()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-4
    # The largest of n independent ones is Gumbel distributed, moved by log n.
    assert stats.kstest((noise.amax(1) - math.log(noise.shape[1])).numpy(), "gumbel_r").pvalue > 1e-4


def test_noise_of_one_group_is_independent_between_its_tokens() -> None:
    # N and bound fixed beforehand: 20 000 pairs of the two lowest of 4 classes, p > 1e-4.
    rows = torch.arange(20_000)
    pair = gumbel_noise(rows, rows, 0, 65)[:, [0, 64]].double()
    classes = torch.bucketize(torch.exp(-torch.exp(-pair)), torch.tensor([0.25, 0.5, 0.75], dtype=torch.double))
    table = (classes[:, 0] * 4 + classes[:, 1]).bincount(minlength=16).numpy()
    assert stats.chisquare(table).pvalue > 1e-4


def test_argmax_of_noisy_logits_samples_from_softmax() -> None:
    # N and bound fixed beforehand: 20 000 draws, p > 1e-4.
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    draws = (logits + gumbel_noise(torch.arange(20000), torch.zeros(20000, dtype=torch.long), 0, 5)).argmax(-1)
    expected = torch.softmax(logits.double(), -1) * 20000
    assert stats.chisquare(draws.bincount(minlength=5).numpy(), expected.numpy()).pvalue > 1e-4
