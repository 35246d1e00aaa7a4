"""nnU-Net trainers of the two stages: diffusion pretraining, and segmentation from it or from scratch."""

from .pretrainer import DiffSegPretrainer
from .segmentation import DiffSegTrainer, DiffSegTrainerScratch

__all__ = ["DiffSegPretrainer", "DiffSegTrainer", "DiffSegTrainerScratch"]
