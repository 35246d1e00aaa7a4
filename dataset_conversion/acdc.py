"""ACDC: the heart in cine MRI, at the end of diastole (ED) and of systole (ES)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, split_ending, visible_files
from diffseg_nnunet.verification import listed

from .converter import TreeConverter
from .description import ConversionPlan, SourceCase, SplitScheme
from .layouts import Found, FoundPart, Layout, Part
from .sources import VolumeFile

PATIENT = r"patient\d{3}"
FOLDS, FOLD_SEED = 5, 1234


class ACDCConverter(TreeConverter):
    """Two frames a patient; of the 4D series nothing is used."""

    format_name = "acdc"
    title = "ACDC: right ventricle, myocardium and left ventricle in cine MRI"
    expects = """\
ACDC/                            any name
    training/patient001/
        Info.cfg                 tells which frames are ED and ES
        patient001_frame01.nii.gz  patient001_frame01_gt.nii.gz
        patient001_frame12.nii.gz  patient001_frame12_gt.nii.gz
        patient001_4d.nii.gz     not read
    testing/patient101/          the same, with or without labels; may be missing"""
    licence = "CC BY-NC-SA 4.0"
    citation = "Bernard et al., IEEE Transactions on Medical Imaging 37, 2514-2525 (2018)"
    dataset_name = "ACDC"
    channel_names = ("MRI",)
    labels: ClassVar[dict[str, int]] = {"right_ventricle": 1, "myocardium": 2, "left_ventricle": 3}
    # a patient is recognised by his Info.cfg, which stands here for his frames
    layouts = (
        Layout(
            "ACDC",
            (
                Part("training", ("training/{case}/Info",), expected=100),
                Part("test", ("testing/{case}/Info",), optional=True, expected=50),
            ),
            case=PATIENT,
            endings=(".cfg",),
        ),
        # the training part of the challenge's first years, extracted on its own
        Layout("ACDC's training part", (Part("training", ("{case}/Info",), expected=100),), PATIENT, (".cfg",)),
    )
    certainty = 1.0

    def find(self, source: Path | None) -> Found:
        # inside training/ the patients alone would be found, and testing/ would be left out
        if source is not None and source.resolve().name in ("training", "testing"):
            source = source.resolve().parent
        return super().find(source)

    def cases(self, found: FoundPart) -> list[SourceCase]:
        folders = [info.parent for (info,) in found.images.values()]
        _refuse_without_info(folders)
        return [case for folder in folders for case in _frames(folder, found.part)]

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        training = [case.identifier for case in plan.cases if case.role == "training"]
        patients = np.unique([identifier.split("_")[0] for identifier in training])
        if len(patients) < FOLDS:
            return ()
        np.random.RandomState(FOLD_SEED).shuffle(patients)
        folds = []
        for fold in range(FOLDS):
            held_out = set(patients[fold::FOLDS])
            val = tuple(identifier for identifier in training if identifier.split("_")[0] in held_out)
            folds.append({"train": tuple(case for case in training if case not in val), "val": val})
        source = "by patient, as nnU-Net's Dataset027_ACDC draws them"
        return (SplitScheme("5-fold", tuple(folds), source),)


def _refuse_without_info(folders: list[Path]) -> None:
    around = sorted(folders[0].parent.iterdir()) if folders else []
    lacking = [str(path) for path in around if re.fullmatch(PATIENT, path.name) and path not in folders]
    if lacking:
        message = f"{len(lacking)} patient(s) have no Info.cfg: {listed(lacking)}."
        raise BadInputError(message, "Extract the download again, or remove these folders.")


def _frames(folder: Path, part: Part) -> list[SourceCase]:
    """The patient's frames that have a label; without any label (the first test set), ED and ES."""
    phases = _phases(folder / "Info.cfg")
    files = {split_ending(path.name)[0]: path for path in visible_files(folder, VOLUME_ENDINGS)}
    labelled = {int(match[1]) for stem in files if (match := re.fullmatch(rf"{folder.name}_frame(\d+)_gt", stem))}
    frames = {*labelled, *phases} if part.role == "training" else labelled or set(phases)
    cases = []
    for frame in sorted(frames):
        stem = f"{folder.name}_frame{frame:02d}"
        wanted = [stem, *([f"{stem}_gt"] if frame in labelled or part.role == "training" else [])]
        if missing := [name for name in wanted if name not in files]:
            message = f"{folder} lacks {listed(missing)}, though Info.cfg or another file tells of that frame."
            raise BadInputError(message, "Extract the download again, or remove the patient's folder.")
        label = VolumeFile(files[f"{stem}_gt"]) if frame in labelled else None
        phase = phases.get(frame, f"frame{frame:02d}")
        cases.append(
            SourceCase(f"{folder.name}_{phase}", (VolumeFile(files[stem]),), label, part.role, patient=folder.name)
        )
    return cases


def _phases(info: Path) -> dict[int, str]:
    """Frame -> 'ED' or 'ES'."""
    try:
        text = info.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise BadInputError(f"{info} cannot be read: {error}.", "Check its permissions.") from error
    found = {match[1]: int(match[2]) for match in re.finditer(r"^\s*(ED|ES)\s*[:=]\s*(\d+)", text, re.MULTILINE)}
    if len(found) != 2 or found["ED"] == found["ES"]:
        message = f"{info} does not tell the frames of ED and ES."
        raise BadInputError(message, "It must have lines such as 'ED: 1' and 'ES: 12'; extract the download again.")
    return {frame: phase for phase, frame in found.items()}
