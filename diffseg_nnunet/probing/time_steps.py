"""A frozen network at several time steps of the diffusion it was pretrained by.

At a fixed time step the conditioned network is the planned one with other norm weights (diffusion/conditioning.py), so
a few time steps are a few sets of norm weights, with no conditioning left to carry about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffseg_nnunet.diffusion.conditioning import affine_norms
from diffseg_nnunet.probing.settings import ProbeSettings

_NOISE_SEED = 0


class TimeSteps(nn.Module):
    """Norm weights, signal and noise of each time step; buffers, since nothing of them is trained.

    Args:
        network: the planned one.
        settings: which time steps; with none, the network is run as it is.
        image_shape: (C, *patch), of the shared noise sample.
    """

    def __init__(self, network: nn.Module, settings: ProbeSettings, image_shape: Sequence[int]):
        super().__init__()
        self._steps, self._names = len(settings.time_steps), []
        self._noisy = settings.noisy and self._steps > 0
        if not self._steps:
            return
        for name, norm in affine_norms(network).items():
            for kind in ("weight", "bias"):
                self._names.append(f"{name}.{kind}")
                now = getattr(norm, kind).detach()
                self.register_buffer(_buffer(self._names[-1]), now.expand(self._steps, -1).clone())
        if self._noisy:
            generator = torch.Generator().manual_seed(_NOISE_SEED)
            self.register_buffer("noise", torch.randn(tuple(image_shape), generator=generator))
            self.register_buffer("signal_left", torch.ones(self._steps))

    def take(self, folded: Sequence[Mapping[str, Tensor]], signal_left: Tensor) -> None:
        """Take over what the time steps are.

        Args:
            folded: for each time step the weights of the network folded there; only those of norms are read.
            signal_left: ᾱ_t of each, shape (steps,).
        """
        for name in self._names:
            getattr(self, _buffer(name)).copy_(torch.stack([weights[name] for weights in folded]))
        if self._noisy:
            self.signal_left.copy_(signal_left)

    def passes(self, network: nn.Module, image: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Runs of the network on an image (B, C, ...), one for each time step."""
        if not self._steps:
            yield partial(network, image)
        for step in range(self._steps):
            weights = {name: getattr(self, _buffer(name))[step] for name in self._names}
            yield partial(self._run, network, weights, image, step)

    def _run(self, network: nn.Module, weights: Mapping[str, Tensor], image: Tensor, step: int) -> Tensor:
        # nnU-Net's networks hold a norm under several names: put in under all of them, as torch does with tied weights,
        # it would not be taken out again
        return functional_call(network, weights, (self._read(image, step),), tie_weights=False)

    def _read(self, image: Tensor, step: int) -> Tensor:
        """x_t of the image, q(x_t | x_0) with the shared noise sample; or the image itself."""
        if not self._noisy:
            return image
        left = self.signal_left[step]
        return left.sqrt() * image + (1 - left).sqrt() * self.noise


def _buffer(name: str) -> str:
    """Names of buffers have no dots."""
    return name.replace(".", "/")
