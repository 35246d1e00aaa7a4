"""WORD: whole abdominal organs, 150 CT."""

from __future__ import annotations

from typing import ClassVar

from .converter import TreeConverter
from .description import ConversionPlan, SplitScheme
from .layouts import Layout, Part


class WORDConverter(TreeConverter):
    """WORD-V0.1.0; the validation cases become training cases, and the official split tells them apart."""

    format_name = "word"
    title = "WORD: 16 abdominal and pelvic structures in CT"
    expects = """\
WORD-V0.1.0/                     any name
    imagesTr/word_0002.nii.gz    labelsTr/word_0002.nii.gz      100 cases
    imagesVal/word_0001.nii.gz   labelsVal/word_0001.nii.gz      20 cases
    imagesTs/word_0014.nii.gz    labelsTs/word_0014.nii.gz       30 cases; may be missing"""
    licence = "GNU General Public License v3.0; for academic research (github.com/HiLab-git/WORD)"
    citation = "Luo et al., WORD, Medical Image Analysis 82, 102642 (2022)"
    dataset_name = "WORD"
    labels: ClassVar[dict[str, int]] = {
        "liver": 1,
        "spleen": 2,
        "left_kidney": 3,
        "right_kidney": 4,
        "stomach": 5,
        "gallbladder": 6,
        "esophagus": 7,
        "pancreas": 8,
        "duodenum": 9,
        "colon": 10,
        "intestine": 11,
        "adrenal_glands": 12,
        "rectum": 13,
        "bladder": 14,
        "left_femur": 15,
        "right_femur": 16,
    }
    layouts = (
        Layout(
            "WORD",
            (
                Part("training", ("imagesTr/word_{case}",), "labelsTr/word_{case}", "word_{case}", expected=100),
                Part("training", ("imagesVal/word_{case}",), "labelsVal/word_{case}", "word_{case}", True, 20),
                Part("test", ("imagesTs/word_{case}",), "labelsTs/word_{case}", "word_{case}", True, 30),
            ),
            case=r"\d{4}",
        ),
    )
    certainty = 1.0

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        folders = {"train": "imagesTr", "val": "imagesVal"}
        fold = {
            part: tuple(case.identifier for case in plan.cases if case.files[0].parent.name == folder)
            for part, folder in folders.items()
        }
        name = "official" if [len(fold[part]) for part in folders] == [100, 20] else "official-part"
        return (SplitScheme(name, (fold,), "imagesTr and imagesVal of the download"),) if fold["val"] else ()
