"""Losses of the towers: next tokens for the context tower, masked blocks for the denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_spec.config import MOE
from twotower_spec.towers.backbone import Backbone
from twotower_spec.towers.layers import MixtureOfExperts
from twotower_spec.towers.model import TwoTowers
from twotower_spec.training.loop import StepLoss
from twotower_spec.training.passes import AllBlocksPass, RecordingPass, SequencePass
from twotower_spec.training.recipe import MaskingConfig

BALANCE_RATE = 1e-3


class ContextLoss:
    """Mean negative log-likelihood of every next token under the context tower.

    Args:
        towers: with the context tower to train.
    """

    def __init__(self, towers: TwoTowers) -> None:
        self.towers = towers

    def __call__(self, rows: Tensor, step: int) -> StepLoss:
        """Loss of a batch [batch, tokens + 1]."""
        logits = self.towers.context(rows[:, :-1], SequencePass(self.towers.config))
        return StepLoss(F.cross_entropy(logits, rows[:, 1:].flatten()), {})


@dataclass(frozen=True)
class MaskedBlocks:
    """Blocks as the denoiser sees them in training.

    Attributes:
        masked: bool [num_blocks, block_size].
        weights: float32 [num_blocks, block_size], of the loss at masked positions; the rows sum to 1.
    """

    masked: Tensor
    weights: Tensor


def mask_blocks(num_blocks: int, block_size: int, config: MaskingConfig, generator: torch.Generator) -> MaskedBlocks:
    """Chooses the positions that each block masks.

    A share of the blocks masks all positions, a share all but the first, which drafting takes from the context tower;
    the rest mask a uniformly drawn number of random positions.
    """
    kind = torch.rand(num_blocks, generator=generator)
    count = torch.randint(1, block_size + 1, (num_blocks,), generator=generator)
    order = torch.rand(num_blocks, block_size, generator=generator).argsort(dim=1).argsort(dim=1)
    masked = order < count[:, None]
    whole = kind < config.all_masked + config.first_given
    masked[whole] = True
    masked[(kind >= config.all_masked) & whole, 0] = False
    weights = torch.where(whole[:, None], config.position_decay ** torch.arange(block_size), 1.0) * masked
    return MaskedBlocks(masked, weights / weights.sum(1, keepdim=True))


class DenoiserLoss:
    """Masked diffusion over all blocks of a sequence at once, on the frozen context tower's states.

    The loss is the mean over blocks of the weighted negative log-likelihood of their masked tokens. The first block of
    a sequence has no context and is not trained on.

    Args:
        towers: context tower frozen.
        masking: what is masked.
        seed: with the step, decides the masks.
    """

    def __init__(self, towers: TwoTowers, masking: MaskingConfig, seed: int) -> None:
        self.towers, self.masking, self.seed = towers, masking, seed

    def __call__(self, rows: Tensor, step: int) -> StepLoss:
        """Loss of a batch [batch, tokens + 1], of which whole blocks are used."""
        size = self.masking.block_sizes[step % len(self.masking.block_sizes)]
        tokens = rows[:, : (rows.shape[1] - 1) // size * size]
        recorded = record_context(self.towers, tokens, size)
        blocks = tokens.reshape(len(rows), -1, size)[:, 1:].flatten(0, 1)
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        chosen = mask_blocks(len(blocks), size, self.masking, generator)
        masked = chosen.masked.to(rows.device)
        nll = masked_nll(self.towers, recorded, blocks, masked)
        weights = chosen.weights.to(rows.device)[masked]
        loss = (nll * weights).sum() / len(blocks)
        whole = (masked.sum(1) >= size - 1)[:, None].expand_as(masked)[masked]
        return StepLoss(loss, {"one_step_loss": _mean(nll.detach(), whole)})


@torch.no_grad()
def record_context(towers: TwoTowers, tokens: Tensor, block_size: int) -> RecordingPass:
    """Records the context tower's states at every block of sequences [rows, blocks * block_size]."""
    recorded = RecordingPass(towers.config, block_size)
    towers.context(tokens, recorded, positions=torch.zeros(0, dtype=torch.long, device=tokens.device))
    return recorded


def masked_nll(towers: TwoTowers, recorded: RecordingPass, blocks: Tensor, masked: Tensor) -> Tensor:
    """Negative log-likelihoods [num_masked] of the masked tokens of blocks [num_blocks, block_size].

    As in generation, the mask token has probability 0.
    """
    denoiser, mask_token_id = towers.denoiser, towers.config.mask_token_id
    modulation = denoiser.time_conditioning.for_block_size(blocks.shape[1])[masked.sum(1)]
    noisy = torch.where(masked, mask_token_id, blocks)
    logits: Tensor = denoiser(noisy, AllBlocksPass(recorded), modulation, masked.flatten().nonzero()[:, 0])
    excluded = torch.zeros(logits.shape[-1], device=logits.device)
    excluded[mask_token_id] = -torch.inf
    return F.cross_entropy(logits + excluded, blocks[masked], reduction="none")


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


class ExpertBalance:
    """Keeps experts evenly used by moving their score corrections, without a loss of its own.

    Args:
        tower: in training.
        towers: its configuration.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".
    """

    def __init__(self, tower: Backbone, towers: TwoTowers) -> None:
        layers = [tower.layers[i] for i, kind in enumerate(towers.config.layer_kinds) if kind == MOE]
        self.experts = [layer.mixer for layer in layers if isinstance(layer.mixer, MixtureOfExperts)]
        self.counts: dict[MixtureOfExperts, Tensor] = {}
        for experts in self.experts:
            experts.register_forward_hook(self._count)

    @torch.no_grad()
    def _count(self, experts: MixtureOfExperts, inputs: tuple[Tensor], _output: Tensor) -> None:
        expert_ids, _ = experts.route(inputs[0].flatten(0, -2))
        self.counts[experts] = expert_ids.flatten().bincount(minlength=len(experts.score_correction))

    @torch.no_grad()
    def update(self) -> None:
        """Raises the corrections of experts that the last pass used less than evenly, and lowers the others'."""
        for experts, counts in self.counts.items():
            experts.score_correction.add_((counts.float().mean() - counts).sign(), alpha=BALANCE_RATE)
