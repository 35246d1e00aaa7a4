"""Checks of images and labels: before a converter publishes them, and for `diffseg verify`."""

from diffseg_nnunet.verification.case import (
    TOLERANCE_DIRECTION,
    TOLERANCE_MM,
    TOLERANCE_SPACING_RELATIVE,
    Volume,
    check_case,
    examine,
)
from diffseg_nnunet.verification.dataset import REQUIRED_KEYS, Progress, in_threads, verify_dataset
from diffseg_nnunet.verification.findings import Finding, Severity, listed
from diffseg_nnunet.verification.volumes import UnreadableVolumeError, read_volume, walk_nifti

__all__ = [
    "REQUIRED_KEYS",
    "TOLERANCE_DIRECTION",
    "TOLERANCE_MM",
    "TOLERANCE_SPACING_RELATIVE",
    "Finding",
    "Progress",
    "Severity",
    "UnreadableVolumeError",
    "Volume",
    "check_case",
    "examine",
    "in_threads",
    "listed",
    "read_volume",
    "verify_dataset",
    "walk_nifti",
]
