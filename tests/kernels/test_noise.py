"""Counter-based noise: the hash, its independence from the batch, and its distribution."""

import pytest
import torch
from scipy import stats

from twotower_kernels.noise import gumbel_noise, op
from twotower_kernels.noise.reference import gumbel_noise_reference

SEEDS = [0, 1, -1, 2**31, 2**62 + 12345, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("position", "draw"), [(0, 0), (5, 0), (5, 3), (300000, 15)])
def test_noise_is_the_hash_of_its_counters(seed: int, position: int, draw: int) -> None:
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), draw, 50)[0]
    expected = [gumbel_noise_reference(seed, position, draw, token) for token in range(50)]
    # Only the two logarithms may round differently.
    torch.testing.assert_close(noise, torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_uniform_noise_is_strictly_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extreme hashes are too rare to be met by chance: they are put in their place."""
    for bits in (-1, 0):  # all ones, all zeros
        monkeypatch.setattr(op, "_finalise", lambda h, bits=bits: torch.zeros_like(h) + bits if h.dim() > 1 else h)
        uniform = op.uniform_noise(torch.tensor([3]), torch.tensor([4]), 0, 5)
        assert float(uniform.min()) > 0 and float(uniform.max()) < 1
        assert op.gumbel_noise(torch.tensor([3]), torch.tensor([4]), 0, 5).isfinite().all()


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


def test_noise_is_gumbel_distributed() -> None:
    # N and bound fixed beforehand: 200 000 values, p > 1e-4.
    rows = torch.arange(200)
    noise = gumbel_noise(rows, rows * 3, 0, 1000).flatten().double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-4


def test_argmax_of_noisy_logits_samples_from_softmax() -> None:
    # N and bound fixed beforehand: 20 000 draws, p > 1e-4.
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    draws = (logits + gumbel_noise(torch.arange(20000), torch.zeros(20000, dtype=torch.long), 0, 5)).argmax(-1)
    expected = torch.softmax(logits.double(), -1) * 20000
    assert stats.chisquare(draws.bincount(minlength=5).numpy(), expected.numpy()).pvalue > 1e-4
