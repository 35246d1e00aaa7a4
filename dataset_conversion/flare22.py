"""FLARE22: 13 abdominal organs in CT, 50 labelled and 2000 unlabelled scans."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, split_ending, visible_files
from diffseg_nnunet.verification import listed

from . import splits
from .anatomy import numbered
from .converter import Option, TreeConverter
from .description import ConversionPlan, SourceCase, SplitScheme
from .layouts import Found, Layout, Part
from .sources import VolumeFile

ORGANS = numbered(
    "liver",
    "right_kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior_vena_cava",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left_kidney",
)
TUNING = "tuning_{case}"
HUGGING_FACE_POOL = "train_pseudo_label"
PSEUDO_LABELS = {"blackbean": "pseudo_label_blackbean_flare22", "aladdin5": "flare22_aladdin5_pseudo"}
PSEUDO = "pseudo_"
# one of the public folders calls its first nine files Case1 ... Case9, where the images are Case_00001 ...
_NUMBER = re.compile(r"Case_?0*(\d+)(?:_0000)?")


def _challenge(name: str, training: str, prefix: str) -> Layout:
    """The challenge's folders, `training` being "Training/" or nothing where that folder itself was extracted."""
    labelled = f"{training}{prefix}LabeledCase50"
    return Layout(
        name,
        (
            Part("training", (f"{labelled}/images/{{case}}_0000",), f"{labelled}/labels/{{case}}", expected=50),
            *(
                Part(
                    "unlabelled", (f"{training}{prefix}UnlabeledCase{span}/{{case}}_0000",), None, "{case}", True, 1000
                )
                for span in ("1-1000", "1001-2000")
            ),
            # tuning and test scans have the same names: only the folder tells them apart
            Part("test", ("Tuning/images/{case}_0000",), "Tuning/labels/{case}", TUNING, True, 50),
            Part("test", ("Testing/{case}_0000",), None, "testing_{case}", True, 200),
        ),
    )


class FLARE22Converter(TreeConverter):
    """FLARE22 in the challenge's folders, as FLARE22Train, or as on Hugging Face."""

    format_name = "flare22"
    title = "FLARE22: 13 abdominal organs in CT, 50 labelled and 2000 unlabelled scans"
    expects = """\
FLARE2022/                                any name
    Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz
    Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz
    Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz
    Training/FLARE22_UnlabeledCase1001-2000/Case_01001_0000.nii.gz
    Tuning/images/FLARETs_0001_0000.nii.gz
    Tuning/labels/FLARETs_0001.nii.gz
    Testing/FLARETs_0001_0000.nii.gz
or
    FLARE22Train/images, FLARE22Train/labels
or, as on Hugging Face (FLARE-MedFM/FLARE-Task2-LaptopSeg),
    train_gt_label/imagesTr, train_gt_label/labelsTr
    train_pseudo_label/imagesTr
    validation/Validation-Public-Images, .../Validation-Public-Labels
    validation/Validation-Hidden-Images
All but the labelled training images may be missing."""
    citation = "Ma et al., FLARE22: Unleashing the strengths of unlabelled data in abdominal organ segmentation"
    options = (
        Option("pseudo_labels", "Add unlabelled scans with a model's labels: blackbean, aladdin5, or their folder."),
        Option("tuning_as_validation", "Make the labelled tuning scans the validation part of one fold.", kind=bool),
    )
    dataset_name = "FLARE22"
    labels = ORGANS
    layouts = (
        _challenge("the challenge's folders", "Training/", "FLARE22_"),
        _challenge("the challenge's folders (FLARE_...)", "Training/", "FLARE_"),
        _challenge("the challenge's folder Training", "", "FLARE22_"),
        Layout(
            "FLARE22Train",
            (Part("training", ("FLARE22Train/images/{case}_0000",), "FLARE22Train/labels/{case}", expected=50),),
        ),
        Layout(
            "Hugging Face's folders",
            (
                Part(
                    "training", ("train_gt_label/imagesTr/{case}_0000",), "train_gt_label/labelsTr/{case}", expected=50
                ),
                Part("unlabelled", (f"{HUGGING_FACE_POOL}/imagesTr/{{case}}_0000",), None, "{case}", True, 2000),
                Part(
                    "test",
                    ("validation/Validation-Public-Images/{case}_0000",),
                    "validation/Validation-Public-Labels/{case}",
                    TUNING,
                    True,
                    50,
                ),
                Part("test", ("validation/Validation-Hidden-Images/{case}_0000",), None, "hidden_{case}", True),
            ),
        ),
    )

    def adapted(
        self,
        plan: ConversionPlan,
        found: Found,
        pseudo_labels: str | None = None,
        tuning_as_validation: bool = False,
        **_: Any,
    ) -> ConversionPlan:
        if pseudo_labels:
            plan = _with_pseudo_labels(plan, _label_folder(found.root, pseudo_labels), pseudo_labels)
        return _tuning_as_validation(plan) if tuning_as_validation else plan

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        """Pseudo-labelled cases train in every fold and validate in none."""
        made = set(plan.extra.get(splits.PSEUDO_LABELLED, {}).get("cases", ()))
        training = {case.identifier for case in plan.cases if case.role == "training"}
        tuning = {case for case in training - made if case.startswith(TUNING.format(case=""))}
        return (
            *splits.one_fold("tuning", training - tuning, tuning, "FLARE22: labelled cases, tuning cases"),
            *splits.k_fold(training - tuning - made, always=made),
        )


def _label_folder(root: Path, wanted: str) -> Path:
    name = PSEUDO_LABELS.get(wanted, wanted)
    candidates = (root / HUGGING_FACE_POOL / name, root / name, Path(wanted))
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        raise BadInputError(
            f"There is no folder of pseudo-labels {candidates[0]}, nor {candidates[1]}.",
            f"Extract it there, or give its path with --pseudo-labels; known names are {listed(PSEUDO_LABELS)}.",
        )
    return folder


def _with_pseudo_labels(plan: ConversionPlan, folder: Path, wanted: str) -> ConversionPlan:
    """Unlabelled cases that have a label in `folder` become training cases whose names say where it is from."""
    labels: dict[int, Path] = {}
    for path in visible_files(folder, VOLUME_ENDINGS):
        number = _case_number(split_ending(path.name)[0])
        if number is None:
            continue
        if number in labels:
            raise BadInputError(f"{labels[number]} and {path.name} are labels of one case.", "Remove one of them.")
        labels[number] = path
    origin = wanted if wanted in PSEUDO_LABELS else re.sub(r"[^A-Za-z0-9]+", "_", folder.name).strip("_")

    def labelled(case: SourceCase) -> SourceCase:
        label = labels.get(_case_number(case.identifier)) if case.role == "unlabelled" else None
        if label is None:
            return case
        identifier = f"{PSEUDO}{origin}_{case.identifier}"
        return replace(case, identifier=identifier, label=VolumeFile(label), role="training")

    cases = tuple(labelled(case) for case in plan.cases)
    made = sorted(new.identifier for new, old in zip(cases, plan.cases, strict=True) if new is not old)
    if not made:
        raise BadInputError(
            f"No label in {folder} belongs to an unlabelled scan.",
            "Its files are named Case_00001.nii.gz, ... like the scans; are both downloaded?",
        )
    note = (
        f"{len(made)} training case(s) have labels that a model made ({folder}), not a person: they are called "
        f"{PSEUDO}{origin}_..., dataset.json lists them, and they are in no fold's validation part."
    )
    unused = len(labels) - len(made)
    notes = [note, *[f"{unused} pseudo-label(s) have no scan here and were left out."] * bool(unused)]
    extra = {**plan.extra, splits.PSEUDO_LABELLED: {"source": folder.name, "cases": made}}
    return replace(plan, cases=cases, extra=extra, notes=(*plan.notes, *notes))


def _tuning_as_validation(plan: ConversionPlan) -> ConversionPlan:
    prefix = TUNING.format(case="")

    def moved(case: SourceCase) -> SourceCase:
        labelled = case.role == "test" and case.identifier.startswith(prefix) and case.label is not None
        return replace(case, role="training") if labelled else case

    cases = tuple(moved(case) for case in plan.cases)
    count = sum(new is not old for new, old in zip(cases, plan.cases, strict=True))
    if not count:
        raise BadInputError(
            "No tuning scan has a label here, so none can validate.", "Download their labels, or leave the option out."
        )
    note = (
        f"{count} tuning case(s) are in imagesTr, as the validation part of the split 'tuning': planning looks at "
        "their size and intensities, and training with `-f all` would train on them."
    )
    return replace(plan, cases=cases, notes=(*plan.notes, note))


def _case_number(stem: str) -> int | None:
    match = _NUMBER.fullmatch(stem)
    return int(match[1]) if match else None
