"""nnU-Net imports every module of this folder flat; absolute imports keep class identity and pickling intact."""

from diffseg_nnunet.trainers import (
    DiffSegPretrainer,
    DiffSegRefinerTrainer,
    DiffSegTrainer,
    DiffSegTrainerDecoder,
    DiffSegTrainerLinear,
    DiffSegTrainerNonlinear,
    DiffSegTrainerPixelEnsemble,
    DiffSegTrainerScratch,
)

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
