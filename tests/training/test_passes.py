"""The passes of training are the passes of generation, many blocks at a time."""

import pytest
import torch

from tests.support.builders import random_ids, tiny_config, tiny_model
from tests.support.tolerances import FLOAT64
from twotower_spec.state import ContextState
from twotower_spec.training.passes import AllBlocksPass, RecordingPass, SequencePass

BLOCK, BLOCKS, ROWS = 4, 5, 3


def rows_of_tokens() -> torch.Tensor:
    return torch.tensor([random_ids(BLOCK * BLOCKS, seed) for seed in range(ROWS)])


@torch.inference_mode()
@pytest.mark.parametrize("pattern", ["MEM*-ME", "M*EM*E", "MME", "*-*"])
def test_a_sequence_pass_gives_the_logits_of_generation(pattern: str) -> None:
    model, tokens = tiny_model(hybrid_override_pattern=pattern), rows_of_tokens()
    logits = model.context(tokens, SequencePass(model.config))
    state = ContextState(model.config, ROWS, 2 * ROWS, torch.float64)
    expected = state.extend(model.context, dict(enumerate(tokens.tolist())), logits="all").logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT64)


@torch.inference_mode()
@pytest.mark.parametrize("pattern", ["MEM*-ME", "M*EM*E", "MME", "*-*"])
def test_all_blocks_at_once_give_the_logits_of_one_block_at_a_time(pattern: str) -> None:
    model, tokens = tiny_model(hybrid_override_pattern=pattern), rows_of_tokens()
    recorded = RecordingPass(model.config, BLOCK)
    model.context(tokens, recorded, positions=torch.zeros(0, dtype=torch.long))
    noisy = tokens.reshape(ROWS, BLOCKS, BLOCK)[:, 1:].clone()
    noisy[:, :, 1::2] = model.config.mask_token_id
    t = torch.full((ROWS * (BLOCKS - 1),), 0.5, dtype=torch.float64)
    together = model.denoiser.step(noisy.flatten(0, 1), AllBlocksPass(recorded), t).unflatten(0, (ROWS, BLOCKS - 1))
    for block in range(1, BLOCKS):
        state = ContextState(model.config, ROWS, 2 * ROWS, torch.float64)
        state.extend(model.context, dict(enumerate(tokens[:, : block * BLOCK].tolist())), logits="none")
        alone = model.denoiser.step(noisy[:, block - 1], state.block_context(range(ROWS), BLOCK), t[:ROWS])
        torch.testing.assert_close(together[:, block - 1], alone, rtol=0, atol=FLOAT64)


def test_the_recording_pass_reads_the_tokens_causally() -> None:
    model, tokens = tiny_model(), rows_of_tokens()
    with torch.inference_mode():
        logits = model.context(tokens, RecordingPass(tiny_config(), BLOCK))
        torch.testing.assert_close(logits, model.context(tokens, SequencePass(tiny_config())), rtol=0, atol=FLOAT64)
