"""Both towers and their heads, nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower_spec.config import TwoTowerConfig
from twotower_spec.errors import ArgumentError, ConfigError, first_line
from twotower_spec.towers.context import ContextTower
from twotower_spec.towers.denoiser import DenoiserTower

# Of GPUs on which Triton converts these numbers.
LEAST_CAPABILITY_OF_FLOAT8 = (8, 9)


class TwoTowers(nn.Module):
    """The context tower and the denoiser tower, or the one of them that was asked for.

    Attributes:
        config: geometry of both.
        dtype: dtype of the context tower's weights and of the state.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        dtype: torch.dtype = torch.float32,
        context_device: torch.device | str = "cpu",
        denoiser_device: torch.device | str | None = None,
        denoiser_dtype: torch.dtype | None = None,
        with_denoiser: bool = True,
        with_context: bool = True,
        denoiser_experts_per_token: int | None = None,
    ) -> None:
        """Allocates uninitialised weights.

        Args:
            config: geometry.
            dtype: dtype of the weights; decay rates, time steps and the router stay float32 at least.
            context_device: where the context tower is.
            denoiser_device: where the denoiser tower is; None for the same device.
            denoiser_dtype: dtype of the denoiser's weights; None for the same. State is converted once per block.
            with_denoiser, with_context: False leaves a tower out, with its memory.
            denoiser_experts_per_token: experts that a token of a block visits; None for as many as `config` says.

        Raises:
            ArgumentError: a device is not there, or a token does not visit so many experts.
        """
        super().__init__()
        denoiser_config = config.with_experts_per_token(denoiser_experts_per_token)
        for place in (context_device, denoiser_device or context_device):
            _check_experts_on(usable_device(place), config)
        self.config, self.dtype = config, dtype
        context_device = usable_device(context_device)
        self._context = ContextTower(config, dtype, context_device) if with_context else None
        self._denoiser: DenoiserTower | None = None
        if with_denoiser:
            device = usable_device(denoiser_device or context_device)
            self._denoiser = DenoiserTower(denoiser_config, denoiser_dtype or dtype, device)

    @property
    def context(self) -> ContextTower:
        """The context tower.

        Raises:
            ArgumentError: the model has only the denoiser tower.
        """
        if self._context is None:
            raise ArgumentError(
                'this model was loaded with towers="denoiser" and has no context tower; load it with towers="both"'
            )
        return self._context

    @property
    def has_denoiser(self) -> bool:
        """Whether the denoiser tower is there."""
        return self._denoiser is not None

    @property
    def denoiser(self) -> DenoiserTower:
        """The denoiser tower; errors as `require_denoiser`."""
        return self.require_denoiser()

    def require_denoiser(self) -> DenoiserTower:
        """The denoiser tower.

        Raises:
            ArgumentError: the model has only the context tower.
        """
        if self._denoiser is None:
            raise ArgumentError(
                'this model was loaded with towers="context" and has no denoiser; load it with '
                'towers="both" for mask diffusion and mock-AR'
            )
        return self._denoiser

    def place_towers_on_devices(
        self, ctx_device: torch.device | str = "cuda:0", den_device: torch.device | str = "cuda:1"
    ) -> TwoTowers:
        """Moves the context tower and the denoiser tower (with the time conditioning); the devices may be equal.

        Sessions are made afterwards: they hold state beside the towers, and graphs that know where weights are.

        Raises:
            ArgumentError: a device is not there.
        """
        ctx_device, den_device = usable_device(ctx_device), usable_device(den_device)
        if self._context is not None:
            self._context.to(ctx_device)
        if self._denoiser is not None:
            self._denoiser.to(den_device)
        return self

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of all weights under the published tensor names."""
        if self._context is not None:
            yield from self._context.checkpoint_tensors()
        if self._denoiser is not None:
            yield from self._denoiser.checkpoint_tensors()


def towers_without_memory(
    config: TwoTowerConfig, dtype: torch.dtype = torch.float32, with_denoiser: bool = True, with_context: bool = True
) -> TwoTowers:
    """The towers on the device `meta`: names, shapes and sizes of all weights before any memory is taken.

    Raises:
        ConfigError: a tensor has more bytes than can be counted.
    """
    try:
        return TwoTowers(config, dtype, context_device="meta", with_denoiser=with_denoiser, with_context=with_context)
    except RuntimeError as error:
        raise ConfigError(
            f"config.json makes a tensor that no memory holds ({first_line(error)}); use the config.json the "
            f"weights were made with"
        ) from error


def usable_device(device: torch.device | str) -> torch.device:
    """Looks a device of this machine up by its name.

    Raises:
        ArgumentError: the name is unknown, or there is no such device.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device {device!r} is not a device name; give cpu, cuda or cuda:N") from error
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        if (wanted.index or 0) >= count:
            raise ArgumentError(
                f"device {device} is not there; this machine has {count} CUDA devices, give one of them or cpu"
            )
    elif wanted.type not in ("cpu", "meta"):
        raise ArgumentError(f"device {device} is not supported; give cpu, cuda or cuda:N")
    return wanted


def computing_device(device: torch.device | str) -> torch.device:
    """Looks up a device that holds numbers, which `meta` does not.

    Raises:
        ArgumentError: it is `meta`, or none that is usable.
    """
    wanted = usable_device(device)
    if wanted.type == "meta":
        raise ArgumentError("device meta holds no numbers; give cpu, cuda or cuda:N")
    return wanted


def _check_experts_on(device: torch.device, config: TwoTowerConfig) -> None:
    """Refuses experts that a device does not multiply by.

    Raises:
        ArgumentError: with the dtype and the device.
    """
    if config.experts_dtype != "float8_e4m3fn" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY_OF_FLOAT8:
        least, found = (".".join(map(str, one)) for one in (LEAST_CAPABILITY_OF_FLOAT8, capability))
        raise ArgumentError(
            f"experts_dtype 'float8_e4m3fn' needs compute capability {least}, and {device} has {found}; give 'int8', "
            f"made from a checkpoint whose experts are not quantised"
        )
