"""nnU-Net trainers: diffusion pretraining, segmentation from it, on it, or from scratch, and refinement."""

from .finetuning import DiffSegTrainer, DiffSegTrainerDecoder, DiffSegTrainerScratch
from .pixel_ensemble import DiffSegTrainerPixelEnsemble
from .pretrainer import DiffSegPretrainer
from .probes import DiffSegTrainerLinear, DiffSegTrainerNonlinear
from .refiner import DiffSegRefinerTrainer

__all__ = [
    "DiffSegPretrainer",
    "DiffSegRefinerTrainer",
    "DiffSegTrainer",
    "DiffSegTrainerDecoder",
    "DiffSegTrainerLinear",
    "DiffSegTrainerNonlinear",
    "DiffSegTrainerPixelEnsemble",
    "DiffSegTrainerScratch",
]
