"""The hybrid layer stack that both towers share, built from the layer pattern."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower_kernels.experts import ExpertOutputs
from twotower_kernels.linear import linear, rounded_once
from twotower_kernels.time_modulation import add_then_norm, modulate_then_norm, norm_then_modulate, rms_norm
from twotower_spec.config import ATTENTION, MAMBA, MOE, STATELESS_LAYERS, TwoTowerConfig, accumulation_dtype
from twotower_spec.towers.layers import Attention, DenseMLP, Mamba2, MixtureOfExperts
from twotower_spec.towers.layers.weights import matrix, parameter, prefixed
from twotower_spec.towers.prefix import Prefix

# Rows [num_reqs or 1, hidden] that a layer reads: the gate of the layer before, its own shift and 1 + scale. None where
# no layer is before it, or nothing is modulated.
ModulationRows = Sequence[Tensor | None]
# The output of a layer, to be added to the residual stream.
Branch = Tensor | ExpertOutputs


class Layer(nn.Module):
    """Residual, norm and mixer of one layer; with time modulation in the denoiser."""

    def __init__(self, config: TwoTowerConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index, self.eps, self.dtype = index, config.norm_eps, dtype
        kind = config.layer_kinds[index]
        self.stateless = kind in STATELESS_LAYERS
        self.norm = parameter(config.hidden_size, dtype=dtype, device=device)
        self.mixer: Mamba2 | Attention | MixtureOfExperts | DenseMLP
        if kind == MAMBA:
            self.mixer = Mamba2(config, dtype, device)
        elif kind == ATTENTION:
            self.mixer = Attention(config, dtype, device)
        elif kind == MOE:
            self.mixer = MixtureOfExperts(config, dtype, device)
        else:
            self.mixer = DenseMLP(config.hidden_size, config.intermediate_size, dtype, device)

    def forward(
        self, x: Tensor, branch: Branch | None, prefix: Prefix, modulation: ModulationRows
    ) -> tuple[Tensor, Branch]:
        """Runs the layer; its output is left to be added where the residual stream is read next.

        Args:
            x: residual stream, [num_reqs, num_tokens, hidden], before the output of the layer before is added.
            branch: that output; None in the first layer.
            prefix: the context.
            modulation: see `ModulationRows`.

        Returns:
            The residual stream that the layer read.
            The layer's output.
        """
        gate, shift, scale_plus_one = modulation
        if shift is None:
            x, h = read_stream(rms_norm, x, branch, gate, self.norm, self.eps, self.dtype)
        else:
            # The order follows where the published training code fuses its norms: before expert layers, after
            # modulation everywhere else.
            norm = norm_then_modulate if self.stateless else modulate_then_norm
            x, h = read_stream(norm, x, branch, gate, shift, scale_plus_one, self.norm, self.eps, self.dtype)
        return x, self.mix(h, prefix)

    def mix(self, h: Tensor, prefix: Prefix) -> Branch:
        """Runs the mixer alone, [..., hidden] to [..., hidden]."""
        mixer = self.mixer
        if isinstance(mixer, Mamba2):
            gate, u, delta = mixer.project(h)
            return mixer.output(prefix.scan(self.index, u, delta, mixer.scan_weights), gate)
        if isinstance(mixer, Attention):
            return mixer.output(prefix.attend(self.index, *mixer.project(h)))
        out: Branch = mixer(h)
        return out

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        yield "norm.weight", self.norm
        yield from prefixed("mixer", self.mixer.checkpoint_tensors())


def read_stream(
    norm: Callable[..., Tensor], x: Tensor, branch: Branch | None, gate: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The residual stream with a layer's output, if there is one, and the norm of it; see `add_then_norm`."""
    return (x, norm(x, *arguments)) if branch is None else add_then_norm(norm, x, branch, gate, *arguments)


class Backbone(nn.Module):
    """Embeddings, layers, final norm and head of one tower.

    Source: modeling_nemotron_h.py, NemotronHModel.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps, self.dtype = config.norm_eps, dtype
        self.residual_dtype = torch.float32 if config.residual_in_fp32 and dtype != torch.float64 else dtype
        self.embeddings = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_hidden_layers))
        self.norm_f = parameter(config.hidden_size, dtype=dtype, device=device)
        self.head = matrix(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        mixing = [i for i, kind in enumerate(config.layer_kinds) if kind not in STATELESS_LAYERS]
        self.num_mixing_layers = mixing[-1] + 1 if mixing else 0

    @property
    def device(self) -> torch.device:
        """Device that the tower is on."""
        return self.embeddings.device

    def forward(
        self,
        token_ids: Tensor,
        prefix: Prefix,
        modulation: Tensor | None = None,
        positions: Tensor | None = None,
        wide_logits: bool = True,
    ) -> Tensor:
        """Logits of a pass.

        Args:
            token_ids: int64 [num_reqs, num_tokens].
            prefix: the context.
            modulation: [num_reqs, num_layers, 3, hidden], rows shift, 1 + scale, gate, or 1 in place of num_reqs for
                all alike; None leaves the layers plain.
            positions: int64 [num_positions], flat indices into [num_reqs * num_tokens] whose logits are wanted;
                None for all.
            wide_logits: False leaves the logits in the tower's dtype, for ops that read them as they are.

        Returns:
            Logits [num_positions, vocab], float32 (float64 in a float64 model) if wide.
        """
        with rounded_once(self.device, self.dtype):
            return self._logits(token_ids, prefix, modulation, positions, wide_logits)

    def _logits(
        self,
        token_ids: Tensor,
        prefix: Prefix,
        modulation: Tensor | None,
        positions: Tensor | None,
        wide_logits: bool,
    ) -> Tensor:
        """`forward`, however products are rounded."""
        layers, mixing = list(self.layers), self.num_mixing_layers
        rows: list[Tensor | None] = [None] * (3 * len(layers) + 1)
        if modulation is not None:
            modulation = modulation.flatten(1, 2)
            rows[1:] = modulation.unbind(1)
        x, branch = F.embedding(token_ids, self.embeddings).to(self.residual_dtype), None
        for i, layer in enumerate(layers[:mixing]):
            x, branch = layer(x, branch, prefix, rows[3 * i : 3 * i + 3])
        if positions is not None:
            # After the last layer that mixes tokens, only those whose logits are wanted are computed.
            x = x.flatten(0, 1)[positions, None]
            if branch is not None:
                assert isinstance(branch, Tensor)  # not of experts, which mix no tokens
                branch = branch.flatten(0, 1)[positions, None]
            if modulation is not None and len(modulation) > 1:
                first = max(3 * mixing - 1, 0)
                rows[first + 1 :] = modulation[:, first:][positions // token_ids.shape[1]].unbind(1)
        for i, layer in enumerate(layers[mixing:], mixing):
            x, branch = layer(x, branch, prefix, rows[3 * i : 3 * i + 3])
        _, h = read_stream(rms_norm, x, branch, rows[-1], self.norm_f, self.eps, x.dtype)
        del x, branch  # logits are the largest tensor of a pass; nothing else needs to be held beside them
        logits = linear(h.flatten(0, 1).to(self.dtype), self.head)
        return logits.to(accumulation_dtype(self.dtype)) if wide_logits else logits

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names; the head stands outside the tower there and is not among them."""
        yield "embeddings.weight", self.embeddings
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from prefixed(f"layers.{layer.index}", layer.checkpoint_tensors())
        yield "norm_f.weight", self.norm_f
