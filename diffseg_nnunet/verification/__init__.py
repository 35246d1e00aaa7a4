"""Checks of images and labels: before a converter publishes them, and for `diffseg verify`."""

from diffseg_nnunet.verification.across import check_records
from diffseg_nnunet.verification.case import Examination, Volume, check_case, examine
from diffseg_nnunet.verification.dataset import (
    REQUIRED_KEYS,
    CaseToCheck,
    DatasetExamination,
    Progress,
    examine_dataset,
    in_threads,
    verify_dataset,
)
from diffseg_nnunet.verification.findings import Finding, Severity, grouped, listed, of_severity, shortened
from diffseg_nnunet.verification.geometry import (
    JITTER_VOXELS,
    TOLERANCE_DIRECTION,
    TOLERANCE_MM,
    TOLERANCE_SPACING_RELATIVE,
)
from diffseg_nnunet.verification.records import CaseRecord, ChannelRecord, LabelRecord, Role
from diffseg_nnunet.verification.volumes import UnreadableVolumeError, read_volume, walk_nifti

__all__ = [
    "JITTER_VOXELS",
    "REQUIRED_KEYS",
    "TOLERANCE_DIRECTION",
    "TOLERANCE_MM",
    "TOLERANCE_SPACING_RELATIVE",
    "CaseRecord",
    "CaseToCheck",
    "ChannelRecord",
    "DatasetExamination",
    "Examination",
    "Finding",
    "LabelRecord",
    "Progress",
    "Role",
    "Severity",
    "UnreadableVolumeError",
    "Volume",
    "check_case",
    "check_records",
    "examine",
    "examine_dataset",
    "grouped",
    "in_threads",
    "listed",
    "of_severity",
    "read_volume",
    "shortened",
    "verify_dataset",
    "walk_nifti",
]
