"""Time enters the planned network by a scale and shift after each affine norm, and folds back exactly.

``y = (1 + s_t)·(γ·norm(x) + β) + b_t`` with (s_t, b_t) a linear function of the time embedding, zero-initialised. At
a fixed t this is again an affine norm, ``γ' = (1 + s_t)·γ`` and ``β' = (1 + s_t)·β + b_t``, so the conditioned network
at t *is* a stock network with other norm weights. Scale-shift conditioning: guided-diffusion's ``use_scale_shift_norm``
(arXiv 2105.05233); folding: ours.

The conditioning is held outside the network (forward hooks), so the network keeps its stock keys and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.errors import StageFailedError

EMBEDDING_DIM = 128
_MAX_PERIOD = 10_000.0


def affine_norms(network: nn.Module) -> dict[str, nn.Module]:
    """The affine normalisation layers of a network by their first module path, each instance once."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
        and getattr(module, "weight", None) is not None
    }


def sinusoidal_embedding(t: Tensor, dim: int = EMBEDDING_DIM) -> Tensor:
    """Sinusoidal time embedding (arXiv 1706.03762 §3.5, as in arXiv 2006.11239): float32, shape (B,) -> (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeConditioning(nn.Module):
    """Scale and shift of every affine norm of a network as a function of the time step.

    A fresh instance leaves the network's output unchanged at every t.

    Args:
        network: the planned network; plain or residual encoder, 2D or 3D.
        embedding_dim: width of the sinusoidal embedding and of the hidden layers.

    Raises:
        StageFailedError: the network has no affine norm, so time could not enter it.
    """

    def __init__(self, network: nn.Module, embedding_dim: int = EMBEDDING_DIM):
        super().__init__()
        norms = affine_norms(network)
        if not norms:
            raise StageFailedError(
                "The planned network has no affine normalisation layer, so it cannot be conditioned on time.",
                'Plan with an affine norm ("norm_op_kwargs": {"affine": true} in the plans).',
            )
        self.embedding_dim = embedding_dim
        self.norm_names = list(norms)
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim), nn.SiLU()
        )
        self.projections = nn.ModuleList(nn.Linear(embedding_dim, 2 * norm.weight.numel()) for norm in norms.values())
        for projection in self.projections:
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
        self._current: list[tuple[Tensor, Tensor]] | None = None
        for index, norm in enumerate(norms.values()):
            norm.register_forward_hook(self._hook(index))

    def scales_and_shifts(self, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(s_t, b_t) for each norm, float32, each of shape (B, channels), for time steps of shape (B,)."""
        # a float32 island: under autocast the scale would be rounded to 8 bits and folding would no longer be exact
        with torch.autocast(t.device.type, enabled=False):
            embedding = self.mlp(sinusoidal_embedding(t, self.embedding_dim))
            return [tuple(projection(embedding).chunk(2, dim=1)) for projection in self.projections]

    @contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Condition every forward pass of the network within the block on the time steps `t`, shape (B,)."""
        self._current = self.scales_and_shifts(t)
        try:
            yield
        finally:
            self._current = None

    def _hook(self, index: int):
        def apply(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._current is None:
                return None
            scale, shift = self._current[index]
            if isinstance(norm, nn.modules.instancenorm._InstanceNorm) and not norm.track_running_stats:
                return _conditioned_instance_norm(norm, inputs[0], scale, shift)
            return _scaled_and_shifted(output, scale, shift)

        return apply


def _conditioned_instance_norm(norm: nn.Module, features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The instance norm with affine weights γ' and β' of each sample's own: the folded norm itself.

    Samples become channels of one sample, so autograd keeps what it keeps for the plain norm and no more, and the
    weights stay float32 whatever the features are.
    """
    weight = ((1 + scale) * norm.weight).flatten()
    bias = ((1 + scale) * norm.bias + shift).flatten()
    flat = features.reshape(1, -1, *features.shape[2:])
    return functional.instance_norm(flat, weight=weight, bias=bias, eps=norm.eps).reshape(features.shape)


def _scaled_and_shifted(output: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The definition, for any other affine norm; in float32, since bfloat16 would round 1 + s to 8 bits."""
    scale, shift = (v.reshape(*v.shape, *(1,) * (output.ndim - 2)) for v in (scale, shift))
    return torch.addcmul(shift, output.float(), 1 + scale).to(output.dtype)


@torch.no_grad()
def fold(network: nn.Module, conditioning: TimeConditioning, t: int) -> dict[str, Tensor]:
    """The weights of the stock network that equals the conditioned `network` at time step `t`.

    Returns:
        A state dict with the network's own keys and shapes, on the network's device; the network is left as it is.
    """
    folded = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    device = next(conditioning.parameters()).device
    per_norm = conditioning.scales_and_shifts(torch.tensor([t], device=device))
    for names, (scale, shift) in zip(_norm_keys(network, conditioning.norm_names), per_norm, strict=True):
        for name in names:
            weight, bias = folded[f"{name}.weight"], folded[f"{name}.bias"]
            gain = 1 + scale[0].to(weight)
            folded[f"{name}.weight"] = gain * weight
            folded[f"{name}.bias"] = gain * bias + shift[0].to(bias)
    return folded


def _norm_keys(network: nn.Module, norm_names: list[str]) -> list[list[str]]:
    """All module paths of each conditioned norm: one instance appears under several in nnU-Net's state dicts."""
    modules = dict(network.named_modules(remove_duplicate=False))
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    return [paths[id(modules[name])] for name in norm_names]
