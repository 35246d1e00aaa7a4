"""nnU-Net trainers of the two stages: diffusion pretraining, and segmentation from it, on it, or from scratch."""

from .pretrainer import DiffSegPretrainer
from .probes import DiffSegTrainerLinear, DiffSegTrainerNonlinear
from .segmentation import DiffSegTrainer, DiffSegTrainerDecoder, DiffSegTrainerScratch

__all__ = [
    "DiffSegPretrainer",
    "DiffSegTrainer",
    "DiffSegTrainerDecoder",
    "DiffSegTrainerLinear",
    "DiffSegTrainerNonlinear",
    "DiffSegTrainerScratch",
]
