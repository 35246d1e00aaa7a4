"""Compare a folder of predicted label maps with a folder of reference label maps, file by file of one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation import statistics
from diffseg_nnunet.evaluation.cases import CaseScores, Task, score_case
from diffseg_nnunet.evaluation.labels import Labels, check_labels
from diffseg_nnunet.evaluation.metrics import DEFINITIONS
from diffseg_nnunet.evaluation.official import official_means
from diffseg_nnunet.evaluation.protocols import PLAIN, Protocol
from diffseg_nnunet.evaluation.statistics import CaseFailure, Evaluation
from diffseg_nnunet.evaluation.structures import Matching, match_structures, settings_of

FILE_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")
_NAMES_IN_MESSAGE = 10


def evaluate_folders(
    prediction: Path | str,
    reference: Path | str,
    labels: Labels,
    *,
    prediction_labels: Labels | None = None,
    protocol: Protocol = PLAIN,
    tolerance_mm: float | None = None,
    tolerances_mm: Mapping[str, float] | None = None,
    workers: int = 1,
    cases: Sequence[str] | None = None,
    seed: int = 0,
    worst: int = statistics.WORST_CASES,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every structure of every case.

    Args:
        prediction: folder of label maps (.nii.gz, .nii, .mha, .nrrd), matched with the references by name.
        reference: folder of label maps.
        labels: of the references: name to value or values, as from `read_label_names`. Voxels whose reference is
            "ignore" count for neither side.
        prediction_labels: of the predictions, matched with the references' by name; None: the same labels.
        protocol: what is scored, and the rules.
        tolerance_mm: tolerance of NSD in mm; None: the protocol's, or 1 mm.
        tolerances_mm: other tolerances, by name of structure.
        workers: cases compared at once, each in a thread; every one holds two label maps in memory.
        cases: compare these only; None: all, and then both folders must have the same cases.
        seed: seed of the confidence intervals.
        worst: how many of the worst cases are named.
        progress: called with (cases done, cases in all) after each case, in the caller's thread.

    Returns:
        The evaluation; cases that cannot be read, have another geometry or unknown label values are in `failures`.

    Raises:
        BadInputError: a folder is missing or empty, cases are missing on one side, no structure is named or matched,
            or a setting is out of range.
    """
    check_labels(labels, "the labels")
    if prediction_labels is not None:
        check_labels(prediction_labels, "the prediction's labels")
    matching = match_structures(labels, prediction_labels, protocol, tolerance_mm, tolerances_mm)
    if workers < 1:
        raise BadInputError(f"{workers} workers cannot compare anything.", "Give 1 or more.")
    pairs = _match(Path(prediction), Path(reference), cases)
    task = Task(matching.structures, labels, labels if prediction_labels is None else prediction_labels, protocol)
    outcomes = _score_all(pairs, task, workers, progress)
    scored = [outcome for outcome in outcomes if isinstance(outcome, CaseScores)]
    rows = tuple(row for of_case in scored for row in of_case.rows)
    return Evaluation(
        rows=rows,
        structures=tuple(
            statistics.summarise_structure(structure.name, rows, seed=seed) for structure in matching.structures
        ),
        case_means=statistics.case_means(rows),
        overall=statistics.summarise_all(rows, seed=seed),
        settings=_settings(labels, prediction_labels, protocol, matching, seed),
        failures=tuple(outcome for outcome in outcomes if isinstance(outcome, CaseFailure)),
        worst_cases=statistics.worst_cases(rows, worst),
        remarks=tuple(remark for of_case in scored for remark in of_case.remarks),
        official=official_means(rows, protocol),
    )


def _settings(
    labels: Labels, prediction_labels: Labels | None, protocol: Protocol, matching: Matching, seed: int
) -> dict[str, Any]:
    return {
        "protocol": protocol.as_plain(),
        **settings_of(matching),
        "labels": _plain_labels(labels),
        "prediction_labels": None if prediction_labels is None else _plain_labels(prediction_labels),
        "absent_structures": protocol.absent_structure_rules(),
        "definitions": DEFINITIONS,
        "interval": {
            "method": statistics.INTERVAL_METHOD,
            "confidence": statistics.CONFIDENCE,
            "resamples": statistics.RESAMPLES,
            "seed": seed,
        },
    }


def _plain_labels(labels: Labels) -> dict[str, int | list[int]]:
    return {name: value if isinstance(value, int) else list(value) for name, value in labels.items()}


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
        raise BadInputError(" ".join(gaps), "Add them, or name the cases that are to be compared (--cases).")
    return {case: (references[case], predictions[case]) for case in wanted}


def _score_all(
    pairs: Mapping[str, tuple[Path, Path]],
    task: Task,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[CaseScores | CaseFailure]:
    # Threads: SimpleITK and the search for nearest surfaces release the interpreter lock, and there are no processes to
    # start and no arrays to copy.
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(_score_or_fail, case, *paths, task) for case, paths in pairs.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _score_or_fail(case: str, reference: Path, prediction: Path, task: Task) -> CaseScores | CaseFailure:
    try:
        return score_case(case, reference, prediction, task)
    except BadInputError as error:
        return CaseFailure(case, str(error))
