"""A case from its files to the network's input: checked, then preprocessed by nnU-Net as the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification import check_case


def preprocess_case(
    case: Case,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: Mapping[str, Any],
    segmentation: str | None = None,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Image (C, *shape) float32, segmentation (1, *shape), and properties of one case, as nnU-Net's preprocessor
    returns them.

    Args:
        segmentation: file to preprocess along with the image, as a cascade's last stage reads it.

    Raises:
        BadInputError: a file cannot be read, or does not fit the others.
    """
    examination = check_case(case, channel_count=len(dataset_json["channel_names"]), label_values=None)
    problems = [finding for finding in examination.findings if finding.severity == "error"]
    if problems:
        raise BadInputError("; ".join(finding.message for finding in problems), problems[0].mend)
    preprocessor = configuration.preprocessor_class(verbose=False)
    return preprocessor.run_case([str(path) for path in case.images], segmentation, plans, configuration, dataset_json)
