"""nnU-Net's cascade: the full resolution reads what the low one says, and is trained anew when that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

LOW, FULL = "3d_lowres", "3d_cascade_fullres"
TRAIN = ("train", 1, "-f", "all", "--strategy", "scratch", "--iterations", 4, "--optimizer", "adamw")


@pytest.fixture
def cascaded(planned: TinyProject, tmp_path: Path) -> TinyProject:
    """Planned with a cascade, as nnU-Net plans it where scans are much larger than a patch; its last stage, which
    reads more, has a smaller patch than 3d_fullres, whose preprocessed data it reads."""
    project = planned.copy(tmp_path)
    path = project.preprocessed / "DiffSegPlans.json"
    plans = json.loads(path.read_text())
    full = plans["configurations"]["3d_fullres"]
    low = {"data_identifier": f"DiffSegPlans_{LOW}", "spacing": [20.0] * 3, "next_stage": FULL}
    divisor = np.prod(full["architecture"]["arch_kwargs"]["strides"], axis=0)
    patch = [int(size) for size in np.subtract(full["patch_size"], divisor)]
    assert min(patch) > 0
    last = {"inherits_from": "3d_fullres", "previous_stage": LOW, "patch_size": patch}
    plans["configurations"] |= {LOW: full | low, FULL: last}
    sections = plans["diffseg"]["configurations"]
    training = sections["3d_fullres"]["training"]
    sections |= {LOW: sections["3d_fullres"], FULL: {"training": training | {"patch_size": patch}}}
    path.write_text(json.dumps(plans))
    return project


def test_a_cascade_is_trained_anew_when_its_first_stage_changes(cascaded: TinyProject) -> None:
    project = cascaded
    predict = ("predict", "-d", 1, "-i", project.test_images, "--strategy", "scratch", "-f", "all", "--no-mirroring")
    second = (*TRAIN, "-c", FULL)
    lines = [
        ("preprocess", 1, "-c", LOW, "3d_fullres"),
        ("preprocess", 1, "-c", FULL),
        (*TRAIN, "-c", LOW),
        second,
        (*predict, "-c", FULL, "-o", project.folder / "out"),
        second,
        (*TRAIN, "-c", LOW, "--seed", 1),
        second,
        ("refine", 1, "-c", FULL, "-f", "all", "--strategy", "scratch", "--iterations", 2, "--width", 8),
        (*predict, "-c", FULL, "-o", project.folder / "refined", "--refine"),
    ]
    preprocessed, shared, _, _, *finished = project.diffseg.in_one_process(lines)
    predicted, unchanged, first_anew, anew, refined, predicted_refined = finished
    for each in (predicted, first_anew, refined, predicted_refined):
        each.ok()
    assert "preprocess/3d_fullres" in preprocessed.ok().out
    assert "preprocess/3d_fullres" not in shared.ok().out
    assert "finished before, unchanged" in unchanged.ok().out
    assert "finished before, unchanged" not in anew.ok().out
    read = project.results / f"DiffSegTrainerScratch__DiffSegPlans__{LOW}" / "predicted_next_stage" / FULL
    assert len(list(read.glob("*.b2nd"))) == len(list((project.raw / "labelsTr").iterdir()))
    for folder, first in (("out", f"{LOW}/fold_all"), ("refined", f"scratch/{LOW}/fold_all")):
        record = json.loads((project.folder / folder / "diffseg_prediction.json").read_text())
        assert list(record["model"]["checkpoints"]) == [f"{FULL}/fold_all", first]
    segmentations = sorted((project.folder / "out").glob("*.nii.gz"))
    assert len(segmentations) == len(list((project.folder / "refined").glob("*.nii.gz"))) == 2
    for path in segmentations:
        assert sitk.ReadImage(str(path)).GetSize() == sitk.ReadImage(str(_image(project, path))).GetSize()
        assert np.isin(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), range(4)).all()


def test_what_a_cascade_cannot_do_is_said_before_anything_is_trained(cascaded: TinyProject) -> None:
    both = ("run", 1, "-c", LOW, FULL)
    lines = [
        both,
        (*both, "--strategy", "scratch", "--labels", "4slices"),
        (*both, "--strategy", "scratch"),
        ("train", 1, "-c", FULL, "-f", 0, "--strategy", "scratch"),
    ]
    unpretrained, sparse, unsegmented, alone = cascaded.diffseg.in_one_process(lines)
    assert f"'{FULL}' is not pretrained: besides the image it reads" in unpretrained.refused().err
    assert f"'{FULL}' is a cascade, which does not learn from cases annotated in part (4slices)" in sparse.refused().err
    for each in (unsegmented, alone):
        assert f"{LOW} has not segmented" in each.refused().err
    assert f"Train {LOW} first, with -f 1 2 3 4 --strategy scratch" in unsegmented.err  # fold 0 is trained by the run
    assert f"Train {LOW} first, with -f 0 1 2 3 4 --strategy scratch" in alone.err
    # folds that leave cases out
    fold, *_ = cascaded.splits()
    (cascaded.preprocessed / "splits_final.json").write_text(json.dumps([fold]))
    (never,) = cascaded.diffseg.in_one_process([(*both, "--strategy", "scratch")])
    assert f"no fold of {cascaded.name} validates on {len(fold['train'])} case(s) that fold 0" in never.refused().err
    assert not list(cascaded.results.glob("DiffSeg*"))


def _image(project: TinyProject, segmentation: Path) -> Path:
    return project.test_images / segmentation.name.replace(".nii.gz", "_0000.nii.gz")
