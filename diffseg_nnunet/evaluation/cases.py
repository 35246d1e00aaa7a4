"""One case: read two label maps, make sure that they can be compared, and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.labels import IGNORE, Labels, scored_structures
from diffseg_nnunet.evaluation.metrics import label_boxes
from diffseg_nnunet.evaluation.protocols import Protocol
from diffseg_nnunet.evaluation.scoring import score_label_maps
from diffseg_nnunet.evaluation.statistics import Remark, ScoreRow
from diffseg_nnunet.evaluation.structures import Structure
from diffseg_nnunet.verification import UnreadableVolumeError, read_volume

GEOMETRY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Task:
    """What every case is scored by: structures, the labels that may occur on either side, the protocol."""

    structures: tuple[Structure, ...]
    reference_labels: Labels
    prediction_labels: Labels
    protocol: Protocol


@dataclass(frozen=True)
class CaseScores:
    """Scores of the structures of one case, and remarks on some of them."""

    rows: tuple[ScoreRow, ...]
    remarks: tuple[Remark, ...]


def score_case(case: str, reference: Path, prediction: Path, task: Task) -> CaseScores:
    """Score one case.

    Raises:
        BadInputError: a file cannot be read, has another geometry or values that are not known.
    """
    protocol = task.protocol
    truth, guess = _read(reference), _read(prediction)
    _check_geometry(truth, guess, prediction.name, protocol.same_grid)
    maps = [
        _label_map(image, labels, path.name, protocol.cast)
        for image, labels, path in (
            (truth, task.reference_labels, reference),
            (guess, task.prediction_labels, prediction),
        )
    ]
    spacing_mm = truth.GetSpacing()[::-1]
    if protocol.cast is not None:
        # As NIfTI stores it, and the official scripts use it.
        spacing_mm = tuple(float(np.float32(side)) for side in spacing_mm)
    ignore = task.reference_labels.get(IGNORE)
    scored = score_label_maps(maps[0], maps[1], task.structures, spacing_mm, protocol, ignore)
    rows = tuple(ScoreRow(case, name, **asdict(result.scores)) for name, result in scored.items())
    remarks = tuple(Remark(case, name, result.remark) for name, result in scored.items() if result.remark)
    return CaseScores(rows, remarks)


def _read(path: Path) -> SimpleITK.Image:
    try:
        image = read_volume(path)
    except UnreadableVolumeError as error:
        raise BadInputError(f"{path.name} cannot be read: {error.reason}.", "Write it again.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise BadInputError(f"{path.name} is not a 3D label map with one value a voxel.", "Write one label map a file.")
    # float32, as NIfTI stores it: what is 0 there is no size of a voxel
    if not all(np.float32(side) > 0 for side in image.GetSpacing()):
        raise BadInputError(f"{path.name} has the spacing {_short(image.GetSpacing())} mm.", "Mend its header.")
    return image


def _check_geometry(reference: SimpleITK.Image, prediction: SimpleITK.Image, name: str, same_grid: bool) -> None:
    for what in ("Size", "Spacing", "Origin", "Direction") if same_grid else ("Size",):
        expected, found = (getattr(image, f"Get{what}")() for image in (reference, prediction))
        if not np.allclose(found, expected, rtol=0, atol=GEOMETRY_TOLERANCE):
            raise BadInputError(
                f"{name} has the {what.lower()} {_short(found)}, its reference {_short(expected)}.",
                "Resample the prediction onto the grid of its reference.",
            )


def _short(numbers: Sequence[float]) -> str:
    return "(" + ", ".join(f"{number:.6g}" for number in numbers) + ")"


def _label_map(image: SimpleITK.Image, labels: Labels, name: str, cast: str | None) -> NDArray[np.integer]:
    """The voxels as whole numbers, shape (z, y, x)."""
    values = SimpleITK.GetArrayFromImage(image)
    if cast is not None:
        # By way of int64: what lies outside the type wraps around, as it does where C converts by way of int.
        return np.trunc(values).astype(np.int64).astype(cast)
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.isfinite(values).all() and (values == np.rint(values)).all() and np.abs(values).max() < 2**31
        if not whole:
            raise BadInputError(f"{name} has values that are not whole numbers.", "Give label maps, not images.")
        values = values.astype(np.int32)
    known = {value for of_structure in scored_structures(labels).values() for value in of_structure}
    known |= {labels[IGNORE]} if IGNORE in labels else set()
    extremes = {int(values.min()), int(values.max())}
    outside = {value for value in extremes if not 0 <= value <= max(known)}
    # The boxes of a map with huge values would need a list of that length, so the extremes are looked at first.
    unknown = sorted(outside or label_boxes(values).keys() - known)
    if unknown:
        raise BadInputError(f"{name} has unknown labels: {', '.join(map(str, unknown))}.", "Name them in the labels.")
    return values
