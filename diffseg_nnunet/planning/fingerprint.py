"""What planning demands of a data set's fingerprint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffseg_nnunet.errors import BadInputError

_AGAIN = "Look at the images with `diffseg verify`, mend or remove these cases, and run `diffseg plan` again."


def check_fingerprint(fingerprint: Mapping[str, Any], dataset: str) -> None:
    """Refuse a fingerprint no plan can be made from.

    Args:
        fingerprint: nnU-Net's.
        dataset: its name, for messages.

    Raises:
        BadInputError: it has no cases, or of one a spacing or a length that is not positive.
    """
    spacings, shapes = fingerprint.get("spacings") or [], fingerprint.get("shapes_after_crop") or []
    if not spacings or len(spacings) != len(shapes):
        raise BadInputError(
            f"The fingerprint of {dataset} has {len(spacings)} spacing(s) and {len(shapes)} shape(s): "
            "there is nothing to plan from.",
            "Convert the data set again with `diffseg convert`, and plan it.",
        )
    for what, unit, values in (("spacing", "mm", spacings), ("shape", "voxels", shapes)):
        bad = [each for each in values if not _is_positive(each)]
        if bad:
            raise BadInputError(
                f"{len(bad)} case(s) of {dataset} have a {what} that is not positive, e.g. "
                f"{' × '.join(f'{value:g}' for value in bad[0])} {unit} (z, y, x).",
                _AGAIN,
            )


def _is_positive(lengths: Sequence[float]) -> bool:
    return len(lengths) > 0 and all(math.isfinite(length) and length > 0 for length in lengths)
