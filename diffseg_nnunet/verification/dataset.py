"""Checks of a whole data set: dataset.json, the listing, and every case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import TypeVar

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import SAME_PATIENT, others_of, same_patient
from diffseg_nnunet.raw_dataset import (
    VOLUME_ENDINGS,
    Case,
    RawDataset,
    split_channel,
    split_ending,
    values_of_labels,
    visible_files,
    why_unusable,
)
from diffseg_nnunet.verification.across import check_records
from diffseg_nnunet.verification.case import Examination, check_case
from diffseg_nnunet.verification.findings import Finding, Severity, listed
from diffseg_nnunet.verification.records import CaseRecord, Role

REQUIRED_KEYS = ("channel_names", "labels", "numTraining", "file_ending")

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CaseToCheck:
    """A case, what it is for, and what it is checked against."""

    case: Case
    role: Role
    channel_count: int
    label_values: frozenset[int] | None


@dataclass(frozen=True)
class DatasetExamination:
    """What came out of a data set.

    Attributes:
        findings: about dataset.json and the listing, then those of the cases (training, unlabelled, test; each by
            identifier), then those that see all cases.
        records: of the cases that could be read, in the same order.
        cases: what came out of each case, by itself.
    """

    findings: tuple[Finding, ...]
    records: tuple[CaseRecord, ...]
    cases: Mapping[CaseToCheck, Examination]


def verify_dataset(dataset: RawDataset, *, workers: int, progress: Progress | None = None) -> list[Finding]:
    """The findings of :func:`examine_dataset`."""
    return list(examine_dataset(dataset, workers=workers, progress=progress).findings)


def examine_dataset(
    dataset: RawDataset,
    *,
    workers: int,
    known: Callable[[CaseToCheck], Examination | None] = lambda job: None,
    progress: Progress | None = None,
) -> DatasetExamination:
    """Check a data set's dataset.json, its listing, and every training, unlabelled and test case.

    What is wrong with a test case is a warning: it stops no training, and a prediction sets it aside.

    Args:
        dataset: the raw data set.
        workers: threads that read files.
        known: what came out of a case whose files have not changed since; None where it is to be read.
        progress: called with (cases done, cases in all) after each case that is read.
    """
    findings = list(_check_keys(dataset))
    if any(finding.severity == "error" for finding in findings):
        return DatasetExamination(tuple(findings), (), {})
    findings += _check_labels(dataset)
    findings += _check_listing(dataset, dataset.labelled_cases(), dataset.unlabelled_cases())
    # labels that cannot be told apart have been found above; comparing voxels with them would repeat it case by case
    broken = any(finding.code == "label_definition" for finding in findings)
    jobs = cases_to_check(dataset, None if broken else frozenset(dataset.label_values))
    cases = {job: found for job in jobs if (found := known(job)) is not None}
    unknown = [job for job in jobs if job not in cases]
    cases |= dict(zip(unknown, in_threads(_check, unknown, workers, progress), strict=True))
    for job in jobs:
        findings += cases[job].findings
    records = tuple(record for job in jobs if (record := cases[job].record) is not None)
    findings += check_records(records, channel_names(dataset), {} if broken else dataset.labels)
    return DatasetExamination(tuple(findings), records, {job: cases[job] for job in jobs})


def cases_to_check(dataset: RawDataset, label_values: frozenset[int] | None) -> list[CaseToCheck]:
    """Every case: training, unlabelled, test; each by identifier. The labels of test cases are those of labelsTs."""
    test_labels = dataset.label_files("labelsTs")
    test = [replace(case, label=test_labels.get(case.identifier)) for case in dataset.test_cases()]
    parts: tuple[tuple[Role, list[Case]], ...] = (
        ("training", dataset.labelled_cases()),
        ("unlabelled", dataset.unlabelled_cases()),
        ("test", test),
    )
    count = len(dataset.channel_names)
    return [CaseToCheck(case, role, count, label_values) for role, cases in parts for case in cases]


def channel_names(dataset: RawDataset) -> list[str]:
    """In channel order."""
    return [str(name) for _, name in sorted(dataset.channel_names.items(), key=lambda item: (len(item[0]), item[0]))]


def _check(job: CaseToCheck) -> Examination:
    values = None if job.label_values is None else set(job.label_values)
    examination = check_case(job.case, channel_count=job.channel_count, label_values=values, role=job.role)
    if job.role != "test":
        return examination
    warnings = (replace(finding, severity="warning") for finding in examination.findings)
    return replace(examination, findings=tuple(warnings))


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, progress: Progress | None = None
) -> list[Result]:
    """``[function(item) for item in items]`` in threads; the first error, or Ctrl-C, cancels what has not begun."""
    results: dict[int, Result] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                results[futures[future]] = future.result()
                if progress is not None:
                    progress(done, len(items))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[index] for index in range(len(items))]


def _check_keys(dataset: RawDataset) -> Iterator[Finding]:
    kinds = {"channel_names": dict, "labels": dict, "numTraining": int, "file_ending": str}
    for key in REQUIRED_KEYS:
        if not isinstance(dataset.dataset_json.get(key), kinds[key]):
            message = f"dataset.json of {dataset.name} has no valid '{key}', which nnU-Net needs."
            yield Finding("missing_key", "", message, "Add it, or convert the data set again.")


def _check_labels(dataset: RawDataset) -> Iterator[Finding]:
    labels = dataset.labels
    try:
        values = sorted(values_of_labels(labels))
    except (TypeError, ValueError):
        message = f"dataset.json of {dataset.name} has labels whose values are no integers: {labels}."
        yield Finding("label_definition", "", message, 'Write them as {"background": 0, "liver": 1, ...}.')
        return
    if labels.get("background") not in (0, "0"):
        message = f"dataset.json of {dataset.name} does not give the label 'background' the value 0."
        yield Finding("labels_background", "", message, 'Add "background": 0 to its labels.')
    if values != list(range(len(values))):
        message = f"The labels of {dataset.name} are {listed(values)}; nnU-Net needs 0, 1, 2, ... without a gap."
        yield Finding("labels_not_consecutive", "", message, "Renumber them in dataset.json and in the label files.")
    if "ignore" in labels and labels["ignore"] != values[-1]:
        message = f"The label 'ignore' of {dataset.name} is {labels['ignore']}, but must be the highest ({values[-1]})."
        yield Finding("ignore_not_highest", "", message, "Renumber the labels in dataset.json and in the label files.")
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    if has_regions and "regions_class_order" not in dataset.dataset_json:
        message = f"dataset.json of {dataset.name} has regions as labels, but no 'regions_class_order'."
        yield Finding("missing_key", "", message, "Add it: the order in which regions are painted over each other.")


def _check_listing(dataset: RawDataset, labelled: list[Case], unlabelled: list[Case]) -> Iterator[Finding]:
    count = len(labelled)
    if "dataset" not in dataset.dataset_json:
        images, labels = dataset.image_files("imagesTr"), dataset.label_files("labelsTr")
        count = len(images)
        for identifier in sorted(images.keys() - labels.keys()):
            message = f"{images[identifier][0]} has no label {identifier}{dataset.file_ending} in labelsTr."
            yield Finding("missing_label", identifier, message, "Add it, or move the image to imagesUn.")
        for identifier in sorted(labels.keys() - images.keys()):
            message = f"{labels[identifier]} has no image {identifier}_0000{dataset.file_ending} in imagesTr."
            yield Finding("missing_image", identifier, message, "Add it, or remove the label.")
    if not labelled and not unlabelled:
        message = f"{dataset.folder} has neither a labelled nor an unlabelled image."
        yield Finding("no_cases", "", message, "Put images into imagesTr (with labelsTr) or imagesUn.")
    if count != dataset.dataset_json["numTraining"]:
        message = f"{dataset.name} has {count} training cases, its dataset.json says numTraining is "
        message += f"{dataset.dataset_json['numTraining']}."
        yield Finding("num_training", "", message, f"Set numTraining to {count}, or add what is missing.")
    yield from _check_names(dataset)
    yield from _check_identifiers(labelled, unlabelled, dataset.test_cases())
    yield from _check_patients(dataset, labelled, unlabelled)


def _check_patients(dataset: RawDataset, labelled: list[Case], unlabelled: list[Case]) -> Iterator[Finding]:
    try:
        groups = same_patient(dataset.dataset_json)
    except BadInputError as error:
        yield Finding("same_patient", "", error.message, error.mend)
        return
    learnt = {case.identifier for case in (*labelled, *unlabelled)}
    test = {case.identifier for case in dataset.test_cases()}
    if missing := sorted({case for group in groups for case in group} - learnt - test):
        message = f"'{SAME_PATIENT}' in dataset.json names {len(missing)} case(s) that are not here: {listed(missing)}."
        yield Finding("same_patient", "", message, "Correct the names, or take them out.", "warning")
    if trained := sorted((others_of(test, groups) & learnt) - test):
        message = f"{len(trained)} case(s) show patients of test images, which therefore are no unseen ones: "
        yield Finding("same_patient", "", f"{message}{listed(trained)}.", "Move either to another data set.", "warning")


def _check_names(dataset: RawDataset) -> Iterator[Finding]:
    """Files that nnU-Net would overlook or cut wrongly, and channels that are missing."""
    ending = dataset.file_ending
    for path in (path for sub in ("imagesTr", "imagesUn", "imagesTs") for path in visible_files(dataset.folder / sub)):
        if path.name.endswith(ending):
            if split_channel(path.name[: -len(ending)])[1] is None:
                message = f"{path} has no channel number before its ending, nnU-Net would take its name for another."
                yield Finding("bad_name", "", message, f"Name it <case>_0000{ending}.")
        elif path.name.endswith(VOLUME_ENDINGS):
            message = f"{path} does not end in {ending}, and would be overlooked."
            twin = path.with_name(split_ending(path.name)[0] + ending)
            if twin.exists():
                message = f"{path} and {twin.name} are the same case twice; only the latter would be used."
            yield Finding("bad_name", "", message, f"Convert it to {ending}, or remove it.")
    for sub in ("imagesTr", "imagesUn", "imagesTs"):
        for identifier, files in dataset.image_files(sub).items():
            numbers = [split_channel(path.name[: -len(ending)])[1] for path in files]
            if numbers != list(range(len(numbers))):
                message = f"The case '{identifier}' in {sub} has the channels {listed(numbers)}."
                yield Finding("channel_numbers", identifier, message, "Number them 0000, 0001, ... without a gap.")


def _check_identifiers(labelled: list[Case], unlabelled: list[Case], test: list[Case]) -> Iterator[Finding]:
    training, pool = ({case.identifier for case in cases} for cases in (labelled, unlabelled))
    for identifier in sorted(training & pool):
        message = f"The case '{identifier}' is both labelled (imagesTr) and unlabelled (imagesUn)."
        yield Finding("duplicate_identifier", identifier, message, "Remove it from imagesUn.")
    for identifier in sorted((training | pool) & {case.identifier for case in test}):
        message = f"The case '{identifier}' is in imagesTs as well as in imagesTr or imagesUn: its test may be no test."
        yield Finding("duplicate_identifier", identifier, message, "Rename or remove one of them.", "warning")
    for folded, times in Counter(identifier.casefold() for identifier in training | pool).items():
        if times > 1:
            same = sorted(identifier for identifier in training | pool if identifier.casefold() == folded)
            message = f"The cases {listed(same)} differ in upper and lower case only, which some file systems ignore."
            yield Finding("duplicate_identifier", same[0], message, "Rename all but one.", "warning")
    for identifier in sorted(training | pool):
        if reason := why_unusable(identifier):
            severity: Severity = "error" if identifier.endswith("_seg") else "warning"
            message = f"The case identifier '{identifier}' is unsafe: {reason}."
            yield Finding("bad_identifier", identifier, message, "Rename its files.", severity)
