"""Masks, losses and gradients of the towers."""

import pytest
import torch

from tests.support.builders import random_ids, tiny_config
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState
from twotower_spec.training.passes import AllBlocksPass, SequencePass
from twotower_spec.training.recipe import MaskingConfig
from twotower_spec.training.stages import digest, start_denoiser_from_context_
from twotower_spec.training.tower_losses import (
    ContextLoss,
    DenoiserLoss,
    ExpertBalance,
    mask_blocks,
    masked_nll,
    record_context,
)

BLOCK = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 3, length: int = 4 * BLOCK + 1) -> torch.Tensor:
    return torch.tensor([random_ids(length, seed) for seed in range(count)])


def new_model() -> TwoTowerModel:
    return TwoTowerModel.from_config(tiny_config(), seed=1)


def test_shares_of_blocks_are_masked_whole_or_with_their_first_token_given() -> None:
    config = MaskingConfig(all_masked=0.25, first_given=0.35)
    masked = mask_blocks(8000, BLOCK, config, generator()).masked
    whole, first_given = masked.all(1), ~masked[:, 0] & masked[:, 1:].all(1)
    # Besides the chosen shares, 0.4 of the blocks hide a uniform count: all of them in 1/8, and all but the first in
    # 1/8 * 1/8. Standard deviations below 0.006; the bound is five of them.
    assert abs(float(whole.float().mean()) - (0.25 + 0.4 / BLOCK)) < 0.03
    assert abs(float(first_given.float().mean()) - (0.35 + 0.4 / BLOCK**2)) < 0.03
    assert bool(masked.any(1).all())


def test_random_masks_have_every_count_equally_often() -> None:
    masked = mask_blocks(8000, BLOCK, MaskingConfig(all_masked=0, first_given=0), generator()).masked
    shares = masked.sum(1).bincount(minlength=BLOCK + 1)[1:] / 8000
    assert torch.allclose(shares, torch.full((BLOCK,), 1 / BLOCK), atol=0.02)
    assert torch.allclose(masked.float().mean(0), torch.full((BLOCK,), (BLOCK + 1) / 2 / BLOCK), atol=0.03)


def test_weights_of_a_block_sum_to_one_and_decay_only_in_one_step_masks() -> None:
    config = MaskingConfig(all_masked=0.5, first_given=0.5, position_decay=0.5)
    chosen = mask_blocks(50, BLOCK, config, generator())
    assert torch.allclose(chosen.weights.sum(1), torch.ones(50))
    assert torch.allclose(chosen.weights[:, 2] / chosen.weights[:, 1], torch.full((50,), 0.5))
    plain = mask_blocks(50, BLOCK, MaskingConfig(all_masked=0, first_given=0, position_decay=0.5), generator())
    expected = plain.masked / plain.masked.sum(1, keepdim=True)
    assert torch.allclose(plain.weights, expected)


def test_the_denoiser_starts_as_the_context_tower_read_block_by_block() -> None:
    """Without time modulation, a block of one token is one causal step: both towers give the same logits."""
    model = new_model()
    start_denoiser_from_context_(model, model)
    tokens = rows()[:, :-1]
    with torch.no_grad():
        recorded = record_context(model, tokens, 1)
        blocks = tokens[:, 1:].reshape(-1, 1)
        modulation = model.denoiser.time_conditioning.for_block_size(1)[torch.ones(len(blocks), dtype=torch.long)]
        denoiser = model.denoiser(blocks, AllBlocksPass(recorded), modulation).view(len(tokens), -1, 61)
        context = model.context(tokens, SequencePass(model.config)).view(len(tokens), -1, 61)
    torch.testing.assert_close(denoiser, context[:, 1:], rtol=0, atol=1e-4)


def test_gradients_reach_every_weight_of_the_denoiser_and_none_of_the_context_tower() -> None:
    model = new_model()
    model.denoiser.requires_grad_(True)
    frozen = digest(model.context)
    masking = MaskingConfig(block_sizes=(BLOCK,), all_masked=0.3, first_given=0.3)
    DenoiserLoss(model, masking, seed=0)(rows(), 0).loss.backward()
    untrained = {"score_correction"}
    for name, parameter in model.denoiser.named_parameters():
        if not name.endswith(tuple(untrained)):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    assert all(parameter.grad is None for parameter in model.context.parameters())
    assert digest(model.context) == frozen


def test_the_denoiser_loss_is_the_mean_over_blocks_of_weighted_nll() -> None:
    model, masking = new_model(), MaskingConfig(block_sizes=(BLOCK,), position_decay=0.7)
    with torch.no_grad():
        got = DenoiserLoss(model, masking, seed=4)(rows(), 9).loss
        tokens = rows()[:, :-1]
        blocks = tokens.reshape(3, -1, BLOCK)[:, 1:].flatten(0, 1)
        chosen = mask_blocks(len(blocks), BLOCK, masking, generator((4 << 32) + 9))
        nll = torch.zeros(blocks.shape)
        nll[chosen.masked] = masked_nll(model, record_context(model, tokens, BLOCK), blocks, chosen.masked)
        expected = (nll * chosen.weights).sum(1).mean()
    torch.testing.assert_close(got, expected)


def test_block_sizes_take_turns_and_a_sequence_is_cut_to_whole_blocks() -> None:
    model, masking = new_model(), MaskingConfig(block_sizes=(8, 4))
    loss = DenoiserLoss(model, masking, seed=0)
    with torch.no_grad():
        values = [float(loss(rows(length=4 * BLOCK + 4), step).loss) for step in (0, 1, 2)]
    assert all(value == value for value in values) and len(set(values)) == 3


def test_the_mask_token_is_no_outcome() -> None:
    model = new_model()
    with torch.no_grad():
        model.denoiser.head[model.config.mask_token_id] = 100.0
        tokens = rows()[:, :-1]
        blocks = tokens.reshape(3, -1, BLOCK)[:, 1:].flatten(0, 1)
        masked = torch.ones(blocks.shape, dtype=torch.bool)
        nll = masked_nll(model, record_context(model, tokens, BLOCK), blocks, masked)
    assert bool((nll < 50).all())


def test_the_context_loss_is_the_mean_nll_of_next_tokens() -> None:
    model = new_model()
    with torch.no_grad():
        got = ContextLoss(model)(rows(), 0).loss
    state = ContextState(model.config, 3, 9, torch.float32)
    logits = state.extend(model.context, dict(enumerate(rows()[:, :-1].tolist())), logits="all").logits
    assert logits is not None
    expected = -logits.log_softmax(-1).gather(1, rows()[:, 1:].reshape(-1, 1)).mean()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("crowded", [0, 3])
def test_experts_that_are_used_too_often_lose_score(crowded: int) -> None:
    model = new_model()
    balance = ExpertBalance(model.context, model)
    experts = balance.experts[0]
    with torch.no_grad():
        experts.score_correction[crowded] = 10.0
        ContextLoss(model)(rows(), 0)
        balance.update()
    assert float(experts.score_correction[crowded]) < 10.0
    assert int((experts.score_correction > 0).sum()) >= 2
