"""The hybrid layer stack that both towers share, built from the layer pattern."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower_kernels.linear import linear
from twotower_kernels.time_modulation import gated_residual, modulate_then_norm, norm_then_modulate, rms_norm
from twotower_spec.config import ATTENTION, MAMBA, MOE, STATELESS_LAYERS, TwoTowerConfig, accumulation_dtype
from twotower_spec.towers.layers import Attention, DenseMLP, Mamba2, MixtureOfExperts
from twotower_spec.towers.layers.weights import matrix, parameter, prefixed
from twotower_spec.towers.prefix import Prefix


class Layer(nn.Module):
    """Norm, mixer and residual of one layer; with time modulation in the denoiser."""

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

    def forward(self, x: Tensor, prefix: Prefix, modulation: Tensor | None) -> Tensor:
        """Runs the layer.

        Args:
            x: residual stream, [num_reqs, num_tokens, hidden].
            prefix: the context.
            modulation: [num_reqs or 1, 3, hidden], rows shift, 1 + scale, gate; None leaves the layer plain.

        Returns:
            The residual stream after the layer.
        """
        if modulation is None:
            return x + self.mix(rms_norm(x.to(self.dtype), self.norm, self.eps), prefix)
        shift, scale_plus_one, gate = modulation.unbind(1)
        # The order follows where the published training code fuses its norms: before expert layers, after modulation
        # everywhere else.
        order = norm_then_modulate if self.stateless else modulate_then_norm
        mixed = self.mix(order(x, shift, scale_plus_one, self.norm, self.eps, self.dtype), prefix)
        return gated_residual(x, mixed, gate)

    def mix(self, h: Tensor, prefix: Prefix) -> Tensor:
        """Runs the mixer alone, [..., hidden] to [..., hidden]."""
        mixer = self.mixer
        if isinstance(mixer, Mamba2):
            gate, u, delta = mixer.project(h)
            return mixer.output(prefix.scan(self.index, u, delta, mixer.scan_weights), gate)
        if isinstance(mixer, Attention):
            return mixer.output(prefix.attend(self.index, *mixer.project(h)))
        out: Tensor = mixer(h)
        return out

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        yield "norm.weight", self.norm
        yield from prefixed("mixer", self.mixer.checkpoint_tensors())


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
            modulation: [num_reqs, num_layers, 3, hidden], or 1 in place of num_reqs for all alike, or None; see
                `Layer.forward`.
            positions: int64 [num_positions], flat indices into [num_reqs * num_tokens] whose logits are wanted;
                None for all.
            wide_logits: False leaves the logits in the tower's dtype, for ops that read them as they are.

        Returns:
            Logits [num_positions, vocab], float32 (float64 in a float64 model) if wide.
        """
        x = F.embedding(token_ids, self.embeddings).to(self.residual_dtype)
        layers = list(self.layers)
        for i, layer in enumerate(layers[: self.num_mixing_layers]):
            x = layer(x, prefix, None if modulation is None else modulation[:, i])
        # After the last layer that mixes tokens, only those whose logits are wanted are computed.
        x = x.flatten(0, 1)
        if positions is not None:
            x = x[positions]
        x = x[:, None]
        if modulation is not None and len(modulation) > 1:
            everything = torch.arange(token_ids.numel(), device=x.device)
            rows = (everything if positions is None else positions) // token_ids.shape[1]
            modulation = modulation[rows]
        for i, layer in enumerate(layers[self.num_mixing_layers :], self.num_mixing_layers):
            x = layer(x, prefix, None if modulation is None else modulation[:, i])
        logits = linear(rms_norm(x[:, 0], self.norm_f, self.eps).to(self.dtype), self.head)
        return logits.to(accumulation_dtype(self.dtype)) if wide_logits else logits

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names; the head stands outside the tower there and is not among them."""
        yield "embeddings.weight", self.embeddings
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from prefixed(f"layers.{layer.index}", layer.checkpoint_tensors())
        yield "norm_f.weight", self.norm_f
