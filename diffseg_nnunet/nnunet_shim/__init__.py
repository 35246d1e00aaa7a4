"""The folder that nnU-Net's ``nnUNet_extTrainer`` points to, so that stock commands find our trainers by name."""

from pathlib import Path

SHIM_FOLDER = Path(__file__).resolve().parent
