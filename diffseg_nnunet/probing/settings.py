"""What a probe reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeSettings:
    """How the frozen features are made. Stored in the checkpoint, so that prediction reads what training read.

    Attributes:
        time_steps: of the pretraining's diffusion; the features of all are joined. None given: the network as it is,
            conditioned on the time step that was folded in, reads the clean image.
        noisy: at each of `time_steps` the image is noised as far as in the pretraining, with one noise sample for all
            images (Baranchuk et al., arXiv 2112.03126); else it is read clean. Without time steps there is no noise.
    """

    time_steps: tuple[int, ...] = ()
    noisy: bool = False

    def __post_init__(self) -> None:
        # a list where they come from JSON
        object.__setattr__(self, "time_steps", tuple(self.time_steps))
        if any(not isinstance(step, int) or step < 0 for step in self.time_steps):
            raise ValueError(f"time steps {self.time_steps} are no numbers from 0")
        if len(set(self.time_steps)) < len(self.time_steps):
            raise ValueError(f"time steps {self.time_steps} are not all different")

    @property
    def words(self) -> str:
        """For the user."""
        if not self.time_steps:
            return "the clean image through the network as it is"
        steps = ", ".join(map(str, self.time_steps))
        return f"the {'noised' if self.noisy else 'clean'} image through the network at time steps {steps}"

    @property
    def passes(self) -> int:
        """How often the network is run for one image."""
        return max(1, len(self.time_steps))
