"""AMOS22: 15 abdominal and pelvic structures in CT and MR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import DATASET_JSON, read_json_object
from diffseg_nnunet.verification import listed

from . import splits
from .anatomy import canonical, numbered
from .converter import Option, TreeConverter
from .description import BACKGROUND, ConversionPlan, SourceCase, SplitScheme
from .layouts import Found, Layout, Part

# the highest number of a CT in each folder (nnU-Net's Dataset218_Amos2022_task1); above it are MR
LAST_CT = {"imagesTr": 410, "imagesVa": 409, "imagesTs": 500}
EITHER = "either_CT_or_MR"  # as nnU-Net's Dataset219_Amos2022_task2 calls it


class AMOS22Converter(TreeConverter):
    """AMOS22 as released after the challenge: imagesVa has labels too, so that its cases become training cases."""

    format_name = "amos22"
    title = "AMOS22: 15 abdominal structures in CT and MR (Zenodo 7262581)"
    expects = """\
amos22/                          any name
    imagesTr/amos_0001.nii.gz
    labelsTr/amos_0001.nii.gz
    imagesVa/amos_0008.nii.gz    may be missing, and so may labelsVa with it
    labelsVa/amos_0008.nii.gz
    imagesTs/amos_0002.nii.gz    may be missing
    dataset.json                 may be missing"""
    citation = "Ji et al., AMOS: A Large-Scale Abdominal Multi-Organ Benchmark, NeurIPS 2022 (arXiv 2206.08023)"
    options = (Option("modality", "CT, MR or both in one data set; default CT."),)
    dataset_name = "AMOS22"
    labels = numbered(
        "spleen",
        "right_kidney",
        "left_kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "inferior_vena_cava",
        "pancreas",
        "right_adrenal_gland",
        "left_adrenal_gland",
        "duodenum",
        "bladder",
        "prostate_or_uterus",
    )
    layouts = (
        Layout(
            "AMOS22",
            (
                Part("training", ("imagesTr/amos_{case}",), "labelsTr/amos_{case}", "amos_{case}"),
                Part("training", ("imagesVa/amos_{case}",), "labelsVa/amos_{case}", "amos_{case}", optional=True),
                Part("test", ("imagesTs/amos_{case}",), "labelsTs/amos_{case}", "amos_{case}", optional=True),
            ),
            case=r"\d{4}",
        ),
    )

    def adapted(self, plan: ConversionPlan, found: Found, modality: str | None = None, **_: Any) -> ConversionPlan:
        wanted = (modality or "CT").upper()
        if wanted not in ("CT", "MR", "BOTH"):
            raise BadInputError(f"'{modality}' is no modality of AMOS22.", "Choose CT, MR or both with --modality.")
        notes = [*plan.notes, *_check_dataset_json(found, self.labels)]
        if wanted == "BOTH":
            notes.append(
                f"CT and MR share the channel '{EITHER}': nnU-Net then normalises each image by its own mean and "
                "standard deviation; its scheme for CT alone would read MR intensities as Hounsfield units."
            )
            return replace(plan, channel_names={0: EITHER}, notes=tuple(notes))
        cases = tuple(case for case in plan.cases if _is_ct(case) == (wanted == "CT"))
        if not any(case.role == "training" for case in cases):
            raise BadInputError(
                f"{found.root} has no labelled {wanted}.", "Choose another with --modality, or download the rest."
            )
        left = len(plan.cases) - len(cases)
        notes.append(f"{len(cases)} {wanted} images by AMOS22's ranges of numbers; {left} others were left out.")
        name = f"{plan.name}{wanted}" if plan.name == self.dataset_name else plan.name
        return replace(plan, name=name, channel_names={0: wanted}, cases=cases, notes=tuple(notes))

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        training = {case.identifier: _folder(case) for case in plan.cases if case.role == "training"}
        parts = ([case for case, folder in training.items() if folder == name] for name in ("imagesTr", "imagesVa"))
        return (*splits.one_fold("official", *parts, "AMOS22: imagesTr, imagesVa"), *splits.k_fold(training))


def _folder(case: SourceCase) -> str:
    return case.images[0].files[0].parent.name


def _is_ct(case: SourceCase) -> bool:
    return int(case.identifier.rsplit("_", 1)[1]) <= LAST_CT[_folder(case)]


def _check_dataset_json(found: Found, labels: dict[str, int]) -> list[str]:
    """Refuse other label values than AMOS22's; tell of listed images that are not there."""
    path = found.root / DATASET_JSON
    if not path.is_file():
        return []
    content = read_json_object(path)
    theirs = content.get("labels")
    named = {canonical(str(name)): str(value) for value, name in theirs.items()} if isinstance(theirs, dict) else {}
    expected = {name: str(value) for name, value in {BACKGROUND: 0, **labels}.items()}
    if named and named != expected:
        differing = [name for name in {**expected, **named} if named.get(name) != expected.get(name)]
        raise BadInputError(
            f"{path} has other labels than AMOS22: {listed(differing)}.",
            "Convert it with the format 'msd' or 'folder', which take the labels from a file.",
        )
    there = {image.name for part in found.parts for files in part.images.values() for image in files if image}
    entries = [entry for key in ("training", "validation", "test") for entry in _entries(content.get(key))]
    missing = sorted({name for entry in entries if (name := entry.rsplit("/", 1)[-1]) not in there})
    return [f"{len(missing)} image(s) that {path} lists are not there: {listed(missing)}."] * bool(missing)


def _entries(listing: Any) -> list[str]:
    """The images of one list of dataset.json, which has {"image": ..., "label": ...} or the bare path."""
    entries = listing if isinstance(listing, list) else []
    images = (entry.get("image") if isinstance(entry, dict) else entry for entry in entries)
    return [image for image in images if isinstance(image, str)]
