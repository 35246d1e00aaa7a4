"""nnU-Net trainers of the two stages: diffusion pretraining, and segmentation from it, on it, or from scratch."""

from .pixel_ensemble import DiffSegTrainerPixelEnsemble
from .pretrainer import DiffSegPretrainer
from .probes import DiffSegTrainerLinear, DiffSegTrainerNonlinear
from .segmentation import DiffSegTrainer, DiffSegTrainerDecoder, DiffSegTrainerScratch

__all__ = [
    "DiffSegPretrainer",
    "DiffSegTrainer",
    "DiffSegTrainerDecoder",
    "DiffSegTrainerLinear",
    "DiffSegTrainerNonlinear",
    "DiffSegTrainerPixelEnsemble",
    "DiffSegTrainerScratch",
]
