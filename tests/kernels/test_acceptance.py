"""Verification of drafts: against the request-by-request reference, and as distributions."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from twotower_kernels.acceptance import AcceptanceRule, Accepted, SamplingTensors, op
from twotower_kernels.acceptance import accept as accept_cumulative
from twotower_kernels.acceptance.reference import accept_reference

VOCAB = 37


def accept(
    logits: Tensor, drafts: Tensor, counts: list[int], sampling: SamplingTensors, rule: AcceptanceRule = "one-hot"
) -> Accepted:
    return accept_cumulative(logits, drafts, cumulative(counts), max(counts, default=0), sampling, rule)


def cumulative(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def sampling_for(num_reqs: int, seed: int = 0, **given: Tensor | None) -> SamplingTensors:
    """Mixes greedy and sampled requests; every filter is on for some and off for others."""
    temperature = torch.tensor([0.0, 0.7, 1.3, 0.2])[torch.arange(num_reqs) % 4]
    values: dict[str, Tensor | None] = {
        "temperature": temperature,
        "top_k": torch.tensor([0, 5, VOCAB, 1, 3], dtype=torch.int32)[torch.arange(num_reqs) % 5],
        "top_p": torch.tensor([1.0, 0.9, 0.5])[torch.arange(num_reqs) % 3],
        "min_p": torch.tensor([0.0, 0.05])[torch.arange(num_reqs) % 2],
    }
    values.update(given)
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (num_reqs,), generator=generator)
    positions = torch.randint(0, 5000, (num_reqs,), generator=generator)
    return SamplingTensors(**values, seeds=seeds, positions=positions)


def likely_drafts(logits: Tensor, counts: list[int], sampling: SamplingTensors, rule: AcceptanceRule) -> Tensor:
    """Drafts of which many are accepted: the tokens that the target takes there, but for every fourth."""
    plain = accept(logits, torch.zeros(0, dtype=torch.int64), [0] * len(logits), _row_by_row(sampling, counts), rule)
    keep = (torch.arange(len(logits)) % 4 != 3) * plain.token_ids[:, 0]
    ends = (torch.tensor(counts) + 1).cumsum(0) - 1
    return keep[[row for row in range(len(logits)) if row not in set(ends.tolist())]]


def _row_by_row(sampling: SamplingTensors, counts: list[int]) -> SamplingTensors:
    """Makes every row a request of its own."""
    request = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) + 1)
    offset = torch.cat([torch.arange(count + 1) for count in counts])
    fields = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: None if value is None else value[request] for name, value in fields.items()}
    return SamplingTensors(**chosen, seeds=sampling.seeds[request], positions=sampling.positions[request] + offset)


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
@pytest.mark.parametrize("counts", [[0], [3], [0, 0, 0], [1, 0, 7, 3, 0, 16], [15, 15, 15, 15, 15]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_request_gets_what_the_reference_gives_it(
    rule: AcceptanceRule, counts: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    logits = (3 * torch.randn(sum(counts) + len(counts), VOCAB, generator=generator)).to(dtype)
    sampling = sampling_for(len(counts))
    drafts = likely_drafts(logits, counts, sampling, rule)
    before = logits.clone()
    result = accept(logits, drafts, counts, sampling, rule)
    expected = accept_reference(logits, drafts, cumulative(counts), max(counts), sampling, rule)
    assert [[token for token in row if token >= 0] for row in result.token_ids.tolist()] == expected
    assert result.num_accepted.tolist() == [len(row) - 1 for row in expected]
    assert result.token_ids.dtype == result.num_accepted.dtype == torch.int32
    assert torch.equal(logits, before)


@pytest.mark.parametrize("absent", ["temperature", "top_k", "top_p", "min_p"])
def test_a_parameter_that_nobody_uses_may_be_left_out(absent: str) -> None:
    counts = [4, 2, 0]
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1))
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}[absent]
    given = sampling_for(3, **{absent: torch.full((3,), neutral)})
    left_out = sampling_for(3, **{absent: None})
    drafts = logits.argmax(-1)[:6]
    for rule in ("one-hot", "coupled"):
        assert torch.equal(accept(logits, drafts, counts, given, rule).token_ids,
                           accept(logits, drafts, counts, left_out, rule).token_ids)  # fmt: skip


def test_ties_go_to_the_first_token_as_argmax_has_it() -> None:
    logits = torch.zeros(3, VOCAB)
    result = accept(logits, torch.tensor([0, 5]), [2], sampling_for(1, temperature=None))
    assert result.token_ids.tolist() == [[0, 0, -1]]


def test_tokens_excluded_by_the_caller_are_never_taken() -> None:
    logits = torch.full((400, 8), -torch.inf)
    logits[:, 2:4] = 0.0
    sampling = sampling_for(400, temperature=torch.ones(400), top_k=None, top_p=None, min_p=None)
    for rule in ("one-hot", "coupled"):
        taken = accept(logits, torch.zeros(0, dtype=torch.int64), [0] * 400, sampling, rule).token_ids
        assert set(taken.flatten().tolist()) == {2, 3}


def test_no_request_at_all() -> None:
    empty = SamplingTensors(
        None, None, None, None, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    )
    assert accept(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.int64), [], empty).token_ids.shape == (0, 1)


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
@pytest.mark.parametrize("draft", [0, 3])
def test_tokens_are_distributed_as_the_target_whatever_was_drafted(rule: AcceptanceRule, draft: int) -> None:
    """N and bound fixed beforehand: 20 000 requests, p > 1e-4 at the drafted position and, after it, at the next."""
    num_reqs, temperature = 20_000, 0.8
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5], [0.0, 0.3, 1.0, -2.0, 0.1]]).repeat(num_reqs, 1)
    sampling = SamplingTensors(
        torch.full((num_reqs,), temperature), None, None, None, torch.arange(num_reqs), torch.full((num_reqs,), 9)
    )
    result = accept(logits, torch.full((num_reqs,), draft), [1] * num_reqs, sampling, rule)
    first, second = result.token_ids[:, 0], result.token_ids[:, 1]
    target = torch.softmax(logits[:2].double() / temperature, -1)
    assert torch.equal(second >= 0, first == draft)
    for taken, probs in ((first, target[0]), (second[second >= 0], target[1])):
        counts = taken.long().bincount(minlength=5).numpy()
        assert stats.chisquare(counts, (probs * len(taken)).numpy()).pvalue > 1e-4


def test_coupled_text_does_not_depend_on_the_drafts() -> None:
    logits = torch.randn(17, VOCAB, generator=torch.Generator().manual_seed(3))
    sampling = sampling_for(1, temperature=torch.ones(1))
    alone = accept(logits, torch.zeros(0, dtype=torch.int64), [0] * 17, _row_by_row(sampling, [16]), "coupled")
    text = alone.token_ids[:, 0]
    for wrong in (0, 5, 16):
        drafts = text[:16].clone()
        drafts[wrong:] = (drafts[wrong:] + 1) % VOCAB
        result = accept(logits, drafts, [16], sampling, "coupled")
        assert result.num_accepted.tolist() == [wrong]
        assert result.token_ids[0, : wrong + 1].tolist() == text[: wrong + 1].tolist()


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_a_batch_too_large_for_memory_is_taken_in_parts(rule: AcceptanceRule, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [3, 0, 5, 1, 0, 2]
    logits = torch.randn(sum(counts) + len(counts), VOCAB, generator=torch.Generator().manual_seed(4))
    sampling = sampling_for(len(counts))
    drafts = likely_drafts(logits, counts, sampling, rule)
    whole = accept(logits, drafts, counts, sampling, rule)
    for most in (1, 5 * VOCAB, 9 * VOCAB):
        monkeypatch.setattr(op, "MOST_LOGITS", most)
        parts = accept(logits, drafts, counts, sampling, rule)
        assert torch.equal(parts.token_ids, whole.token_ids) and torch.equal(parts.num_accepted, whole.num_accepted)


def test_tokens_as_probable_as_the_last_of_top_p_stay() -> None:
    logits = torch.tensor([[0.0, 0.0, -100.0, -100.0]]).repeat(200, 1)
    sampling = sampling_for(200, temperature=torch.ones(200), top_k=None, min_p=None, top_p=torch.full((200,), 0.4))
    taken = accept(logits, torch.zeros(0, dtype=torch.int64), [0] * 200, sampling).token_ids
    assert set(taken.flatten().tolist()) == {0, 1}


def test_a_number_of_rows_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits has 3 rows; 3 drafts of 1 requests need 4"):
        accept(torch.zeros(3, VOCAB), torch.zeros(3, dtype=torch.int64), [3], sampling_for(1))
