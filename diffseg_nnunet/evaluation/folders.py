"""Compare a folder of predicted label maps with a folder of reference label maps, file by file of one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation import statistics
from diffseg_nnunet.evaluation.labels import IGNORE, Labels, check_labels, scored_structures
from diffseg_nnunet.evaluation.metrics import ABSENT_STRUCTURE_RULES, DEFINITIONS, label_boxes, score_label_maps
from diffseg_nnunet.evaluation.statistics import CaseFailure, Evaluation, ScoreRow
from diffseg_nnunet.verification import UnreadableVolumeError, read_volume

FILE_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")
GEOMETRY_TOLERANCE = 1e-3
_NAMES_IN_MESSAGE = 10


def evaluate_folders(
    prediction: Path | str,
    reference: Path | str,
    labels: Labels,
    *,
    tolerance_mm: float = 1.0,
    workers: int = 1,
    cases: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every structure of every case.

    Args:
        prediction: folder of label maps (.nii.gz, .nii, .mha, .nrrd), matched with the references by name.
        reference: folder of label maps.
        labels: name to value or values, as from `read_label_names`. Voxels whose reference is "ignore" count for
            neither side.
        tolerance_mm: tolerance of NSD in mm.
        workers: cases compared at once, each in a thread; every one holds two label maps in memory.
        cases: compare these only; None: all, and then both folders must have the same cases.
        seed: seed of the confidence intervals.
        progress: called with (cases done, cases in all) after each case, in the caller's thread.

    Returns:
        The evaluation; cases that cannot be read, have another geometry or unknown label values are in `failures`.

    Raises:
        BadInputError: a folder is missing or empty, cases are missing on one side, no structure is named, or a setting
            is out of range.
    """
    check_labels(labels, "the labels")
    if not tolerance_mm >= 0:
        raise BadInputError(f"The tolerance {tolerance_mm} mm is below 0.", "Give 0 mm or more.")
    if workers < 1:
        raise BadInputError(f"{workers} workers cannot compare anything.", "Give 1 or more.")
    pairs = _match(Path(prediction), Path(reference), cases)
    outcomes = _score_all(pairs, labels, tolerance_mm, workers, progress)
    scored = [outcome for outcome in outcomes if not isinstance(outcome, CaseFailure)]
    rows = tuple(row for of_case in scored for row in of_case)
    return Evaluation(
        rows=rows,
        structures=tuple(statistics.summarise_structure(name, rows, seed=seed) for name in scored_structures(labels)),
        case_means=statistics.case_means(rows),
        overall=statistics.summarise_all(rows, seed=seed),
        settings=_settings(labels, tolerance_mm, seed),
        failures=tuple(outcome for outcome in outcomes if isinstance(outcome, CaseFailure)),
    )


def _settings(labels: Labels, tolerance_mm: float, seed: int) -> dict[str, Any]:
    return {
        "tolerance_mm": float(tolerance_mm),
        "labels": {name: value if isinstance(value, int) else list(value) for name, value in labels.items()},
        "absent_structures": ABSENT_STRUCTURE_RULES,
        "definitions": DEFINITIONS,
        "interval": {
            "method": statistics.INTERVAL_METHOD,
            "confidence": statistics.CONFIDENCE,
            "resamples": statistics.RESAMPLES,
            "seed": seed,
        },
    }


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", "Give a folder of label maps.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((end for end in FILE_ENDINGS if path.name.lower().endswith(end)), None)
        if ending is None or path.name.startswith("."):
            continue
        case = path.name[: -len(ending)]
        if case in files:
            raise BadInputError(f"Two files of one case in {folder}: {files[case].name}, {path.name}.", "Remove one.")
        files[case] = path
    if not files:
        raise BadInputError(f"There is no label map in {folder}.", f"Give a folder with {', '.join(FILE_ENDINGS)}.")
    return files


def _named(names: Iterable[str]) -> str:
    names = sorted(names)
    more = len(names) - _NAMES_IN_MESSAGE
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def _match(prediction: Path, reference: Path, cases: Sequence[str] | None) -> dict[str, tuple[Path, Path]]:
    """Case to (reference file, prediction file)."""
    predictions, references = _files(prediction), _files(reference)
    wanted = sorted(predictions.keys() | references.keys() if cases is None else set(cases))
    if not wanted:
        raise BadInputError("No case is named, so there is nothing to compare.", "Name a case or leave the cases out.")
    gaps = []
    for files, others, folder, what in (
        (predictions, references, prediction, "predictions"),
        (references, predictions, reference, "references"),
    ):
        if missing := [others[case].name if case in others else case for case in wanted if case not in files]:
            gaps.append(f"{len(missing)} {what} are missing in {folder}: {_named(missing)}.")
    if gaps:
        raise BadInputError(" ".join(gaps), "Add them, or name the cases that are to be compared.")
    return {case: (references[case], predictions[case]) for case in wanted}


def _score_all(
    pairs: Mapping[str, tuple[Path, Path]],
    labels: Labels,
    tolerance_mm: float,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[list[ScoreRow] | CaseFailure]:
    # Threads: SimpleITK and the distance transform release the interpreter lock (two threads measured 1.5 times as
    # fast on surfaces and 1.8 times on reading), and there are no processes to start and no arrays to copy.
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(_score_case, case, *paths, labels, tolerance_mm) for case, paths in pairs.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _score_case(
    case: str, reference: Path, prediction: Path, labels: Labels, tolerance_mm: float
) -> list[ScoreRow] | CaseFailure:
    structures = scored_structures(labels)
    ignore = labels.get(IGNORE)
    known = {value for values in structures.values() for value in values} | ({ignore} - {None})
    try:
        truth, guess = _read(reference), _read(prediction)
        _check_geometry(truth, guess, prediction.name)
        maps = [_label_map(truth, known, reference.name), _label_map(guess, known, prediction.name)]
    except BadInputError as error:
        return CaseFailure(case, str(error))
    spacing_mm = truth.GetSpacing()[::-1]
    scores = score_label_maps(*maps, structures, spacing_mm, tolerance_mm, ignore)
    return [ScoreRow(case, name, **asdict(of_structure)) for name, of_structure in scores.items()]


def _read(path: Path) -> SimpleITK.Image:
    try:
        image = read_volume(path)
    except UnreadableVolumeError as error:
        raise BadInputError(f"{path.name} cannot be read: {error.reason}.", "Write it again.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise BadInputError(f"{path.name} is not a 3D label map with one value a voxel.", "Write one label map a file.")
    return image


def _check_geometry(reference: SimpleITK.Image, prediction: SimpleITK.Image, name: str) -> None:
    for what in ("Size", "Spacing", "Origin", "Direction"):
        expected, found = (getattr(image, f"Get{what}")() for image in (reference, prediction))
        if not np.allclose(found, expected, rtol=0, atol=GEOMETRY_TOLERANCE):
            raise BadInputError(
                f"{name} has the {what.lower()} {_short(found)}, its reference {_short(expected)}.",
                "Resample the prediction onto the grid of its reference.",
            )


def _short(numbers: Sequence[float]) -> str:
    return "(" + ", ".join(f"{number:.6g}" for number in numbers) + ")"


def _label_map(image: SimpleITK.Image, known: set[int], name: str) -> NDArray[np.integer]:
    """The voxels as whole numbers, shape (z, y, x)."""
    values = SimpleITK.GetArrayFromImage(image)
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.isfinite(values).all() and (values == np.rint(values)).all() and np.abs(values).max() < 2**31
        if not whole:
            raise BadInputError(f"{name} has values that are not whole numbers.", "Give label maps, not images.")
        values = values.astype(np.int32)
    extremes = {int(values.min()), int(values.max())}
    outside = {value for value in extremes if not 0 <= value <= max(known)}
    # The boxes of a map with huge values would need a list of that length, so the extremes are looked at first.
    unknown = sorted(outside or label_boxes(values).keys() - known)
    if unknown:
        raise BadInputError(f"{name} has unknown labels: {', '.join(map(str, unknown))}.", "Name them in the labels.")
    return values
