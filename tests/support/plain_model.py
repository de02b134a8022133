"""Both towers for one sequence, token by token, straight from the formulas: slow, obvious, float64.

It shares no code with the towers and knows the weights by their published names only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower_spec import TwoTowerConfig, TwoTowerModel


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps)


class PlainTower:
    """One tower. After `run`, `layers` hold the states of the Mamba layers, and the keys and values of attention."""

    def __init__(self, model: TwoTowerModel, part: str) -> None:
        self.config: TwoTowerConfig = model.config
        self.weights = {name: tensor.double() for name, tensor in model.checkpoint_tensors()}
        self.part = part
        self.head = self.weights["context_lm_head.weight" if part == "context_tower" else "lm_head.weight"]

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        prefix = f"{self.part}.layers.{layer}."
        return {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}

    def modulation(self, t: float | None, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        if t is None:
            return None
        w = self.weights
        frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
        angles = [1000 * t * f for f in frequencies]
        embedding = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        hidden = silu(w["t_embedder.mlp.0.weight"] @ embedding + w["t_embedder.mlp.0.bias"])
        embedded = w["t_embedder.mlp.2.weight"] @ hidden + w["t_embedder.mlp.2.bias"]
        table = (w["t_block.1.weight"] @ silu(embedded) + w["t_block.1.bias"]).view(3, -1)
        shift, scale, gate = table + w[f"scale_shift_tables.{layer}"]
        return shift, scale, gate

    def run(self, ids: list[int], memory: dict[int, list[Tensor]], t: float | None, causal: bool) -> Tensor:
        """Logits [tokens, vocab]. `memory` per layer: [conv history, SSM state] or [keys, values]; it is replaced."""
        config = self.config
        x = [self.weights[f"{self.part}.embeddings.weight"][i] for i in ids]
        for layer, kind in enumerate(config.hybrid_override_pattern):
            w = self.layer_weights(layer)
            modulation = self.modulation(t, layer)
            inputs = []
            for token in x:
                if modulation is None:
                    inputs.append(rms(token, config.norm_eps) * w["norm.weight"])
                elif kind in "M*":
                    modulated = token * (1 + modulation[1]) + modulation[0]
                    inputs.append(rms(modulated, config.norm_eps) * w["norm.weight"])
                else:
                    normed = rms(token, config.norm_eps) * w["norm.weight"]
                    inputs.append(normed * (1 + modulation[1]) + modulation[0])
            if kind == "M":
                outputs = self.mamba(w, inputs, layer, memory)
            elif kind == "*":
                outputs = self.attention(w, inputs, layer, memory, causal)
            elif kind == "E":
                outputs = [self.experts(w, h) for h in inputs]
            else:
                outputs = [self.mlp(w, "mixer.", h) for h in inputs]
            gate = 1.0 if modulation is None else modulation[2]
            x = [token + gate * out for token, out in zip(x, outputs, strict=True)]
        final = self.weights[f"{self.part}.norm_f.weight"]
        return torch.stack([self.head @ (rms(token, config.norm_eps) * final) for token in x])

    def mamba(
        self, w: dict[str, Tensor], inputs: list[Tensor], layer: int, memory: dict[int, list[Tensor]]
    ) -> list[Tensor]:
        c = self.config
        heads, dim, state_size, taps = c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.conv_kernel
        width, bc = heads * dim, c.n_groups * state_size
        history, state = memory.get(layer) or [
            torch.zeros(taps - 1, width + 2 * bc).double(),
            torch.zeros(heads, dim, state_size).double(),
        ]
        outputs = []
        for h in inputs:
            projected = w["mixer.in_proj.weight"] @ h
            z, u, delta = projected[:width], projected[width : 2 * width + 2 * bc], projected[2 * width + 2 * bc :]
            window = torch.cat([history, u[None]])
            history = window[1:]
            mixed = torch.zeros_like(u)
            for k in range(taps):
                mixed = mixed + window[k] * w["mixer.conv1d.weight"][:, 0, k]
            if c.use_conv_bias:
                mixed = mixed + w["mixer.conv1d.bias"]
            mixed = silu(mixed)
            xs = mixed[:width].view(heads, dim)
            b, cc = mixed[width : width + bc].view(-1, state_size), mixed[width + bc :].view(-1, state_size)
            y = torch.zeros(heads, dim).double()
            state = state.clone()
            for j in range(heads):
                group = j // (heads // c.n_groups)
                step = math.log1p(math.exp(float(delta[j] + w["mixer.dt_bias"][j])))
                decay = math.exp(-step * math.exp(float(w["mixer.A_log"][j])))
                state[j] = decay * state[j] + step * torch.outer(xs[j], b[group])
                y[j] = state[j] @ cc[group] + w["mixer.D"][j] * xs[j]
            gated = (y.flatten() * silu(z)).view(c.n_groups, -1)
            normed = torch.cat([rms(group, c.norm_eps) for group in gated]) * w["mixer.norm.weight"]
            outputs.append(w["mixer.out_proj.weight"] @ normed)
        memory[layer] = [history, state]
        return outputs

    def attention(
        self, w: dict[str, Tensor], inputs: list[Tensor], layer: int, memory: dict[int, list[Tensor]], causal: bool
    ) -> list[Tensor]:
        c = self.config
        keys, values = memory.get(layer) or [torch.zeros(0, c.num_key_value_heads, c.head_dim).double()] * 2
        before = len(keys)
        new_keys = torch.stack([(w["mixer.k_proj.weight"] @ h).view(-1, c.head_dim) for h in inputs])
        new_values = torch.stack([(w["mixer.v_proj.weight"] @ h).view(-1, c.head_dim) for h in inputs])
        keys, values = torch.cat([keys, new_keys]), torch.cat([values, new_values])
        memory[layer] = [keys, values]
        outputs = []
        for i, h in enumerate(inputs):
            query = (w["mixer.q_proj.weight"] @ h).view(-1, c.head_dim)
            seen = before + i + 1 if causal else len(keys)
            heads = []
            for j in range(c.num_attention_heads):
                kv = j // (c.num_attention_heads // c.num_key_value_heads)
                weights = torch.softmax(keys[:seen, kv] @ query[j] / math.sqrt(c.head_dim), dim=0)
                heads.append(weights @ values[:seen, kv])
            outputs.append(w["mixer.o_proj.weight"] @ torch.cat(heads))
        return outputs

    def mlp(self, w: dict[str, Tensor], prefix: str, h: Tensor) -> Tensor:
        return w[f"{prefix}down_proj.weight"] @ torch.relu(w[f"{prefix}up_proj.weight"] @ h) ** 2

    def experts(self, w: dict[str, Tensor], h: Tensor) -> Tensor:
        c = self.config
        g = 1 / (1 + torch.exp(-(w["mixer.gate.weight"] @ h)))
        choice = (g + w["mixer.gate.e_score_correction_bias"]).tolist()
        size = c.n_routed_experts // c.n_group
        if c.n_group > 1:
            scores = [sum(sorted(choice[i * size : (i + 1) * size])[-2:]) for i in range(c.n_group)]
            kept = sorted(range(c.n_group), key=lambda i: -scores[i])[: c.topk_group]
            choice = [value if i // size in kept else 0.0 for i, value in enumerate(choice)]
        chosen = sorted(range(c.n_routed_experts), key=lambda i: -choice[i])[: c.num_experts_per_tok]
        total = sum(float(g[i]) for i in chosen) + 1e-20 if c.norm_topk_prob else 1.0
        out = self.mlp(w, "mixer.shared_experts.", h)
        for i in chosen:
            out = out + float(g[i]) / total * c.routed_scaling_factor * self.mlp(w, f"mixer.experts.{i}.", h)
        return out
