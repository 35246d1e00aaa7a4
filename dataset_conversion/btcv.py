"""BTCV, "Beyond the Cranial Vault": 30 labelled and 20 unlabelled abdominal CTs of Synapse syn3193805."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import listed

from . import splits
from .anatomy import numbered
from .converter import TreeConverter
from .description import ConversionPlan, SplitScheme
from .layouts import Found, Layout, Part, find

IDENTIFIER = "btcv_{case}"
# the same Synapse project offers a cardiac set beside the abdominal one; as its files lie next to Abdomen/, it is often
# taken for BTCV. Its images have 192×156×12 voxels or so, and its labels one structure.
CARDIAC = Layout("the cardiac set", (Part("training", ("averaged-training-images/DET{case}_avg",)),), case=r"\d+")


def _layout(name: str, images: str, labels: str, test: str) -> Layout:
    return Layout(
        name,
        (
            Part("training", (images,), labels, IDENTIFIER, expected=len(splits.BTCV_CASES)),
            Part("test", (test,), None, IDENTIFIER, optional=True, expected=20),
        ),
        case=r"\d{4}",
    )


class BTCVConverter(TreeConverter):
    """BTCV's abdominal part; the labels of the 20 test cases are not public."""

    format_name = "btcv"
    title = "BTCV: 13 abdominal organs in CT (Synapse syn3193805, Abdomen/RawData.zip)"
    expects = """\
RawData/                                 any name
    Training/img/img0001.nii.gz          or Training/img/0001/img0001.nii.gz
    Training/label/label0001.nii.gz      or Training/label/0001/label0001.nii.gz
    Testing/img/img0061.nii.gz           may be missing
or
    imagesTr/img0001.nii.gz
    labelsTr/label0001.nii.gz
    imagesTs/img0061.nii.gz              may be missing"""
    citation = "Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault: Workshop and Challenge, 2015"
    dataset_name = "BTCV"
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
        "portal_and_splenic_veins",
        "pancreas",
        "right_adrenal_gland",
        "left_adrenal_gland",
    )
    layouts = (
        _layout("RawData.zip", "Training/img/img{case}", "Training/label/label{case}", "Testing/img/img{case}"),
        _layout(
            "RawData with a folder a case",
            "Training/img/{case}/img{case}",
            "Training/label/{case}/label{case}",
            "Testing/img/{case}/img{case}",
        ),
        _layout("MONAI's folders", "imagesTr/img{case}", "labelsTr/label{case}", "imagesTs/img{case}"),
    )

    def find(self, source: Path | None) -> Found:
        try:
            return super().find(source)
        except BadInputError as error:
            if source is not None and source.is_dir() and (cardiac := find(source, (CARDIAC,))) is not None:
                raise BadInputError(
                    f"{cardiac.root} holds the averaged-* folders (DET..._avg) of Synapse syn3193805: they are its "
                    "cardiac set, not the 30 abdominal CTs of BTCV.",
                    "Download Abdomen/RawData.zip of the same project and extract it; the format 'folder' converts "
                    "any images and labels of equal names.",
                ) from error
            raise

    def adapted(self, plan: ConversionPlan, found: Found, **options: Any) -> ConversionPlan:
        _, lacking = splits.divided(_published(), _training(plan))
        if not lacking:
            return plan
        gone = sorted({case for cases in lacking.values() for case in cases})
        note = (
            f"Published splits are offered whole or not at all: {listed(lacking)} need(s) cases that are not here "
            f"({listed(gone)})."
        )
        return replace(plan, notes=(*plan.notes, note))

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        offered, _ = splits.divided(_published(), _training(plan))
        return (*offered, *splits.k_fold(_training(plan)))


def _published() -> tuple[SplitScheme, ...]:
    return splits.btcv(lambda number: IDENTIFIER.format(case=f"{number:04d}"))


def _training(plan: ConversionPlan) -> list[str]:
    return [case.identifier for case in plan.cases if case.role == "training"]
