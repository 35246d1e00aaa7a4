"""Label budgets of the phantom's folds: what is drawn and recorded, and what the commands make of it."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffseg_nnunet.benchmarking.divisions import Division, divisions, ensure_fold
from diffseg_nnunet.benchmarking.protocol import PROTOCOLS
from diffseg_nnunet.benchmarking.provenance import refuse_seen
from diffseg_nnunet.budgets.folds import BudgetFold
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.folds import trained_folds
from diffseg_nnunet.pipeline.label_budgets import base_fold, budget_of, draw_budget
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import ensure_splits
from diffseg_nnunet.pipeline.starting import learnt_in_training
from diffseg_nnunet.trainers.sparse import sparse_annotations
from diffseg_nnunet.workspace import Workspace

from .conftest import Recorder

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

CONFIGURATION = "3d_fullres"
SHAPE = (7, 6, 5)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "rare": 3}
RAW_FILES = (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz"))


@pytest.fixture
def small(tmp_path: Path) -> Project:
    """Six cases, cropped by one slice and transposed, whose labels are random but for their empty first two slices;
    'rare' is in none. Nothing else of a data set is there."""
    workspace = Workspace(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")
    project = Project(workspace, "Dataset001_Test", Recorder())
    labels, cases = project.preprocessed / "gt_segmentations", project.preprocessed / "DiffSegPlans_3d_fullres"
    labels.mkdir(parents=True)
    cases.mkdir()
    configurations = {CONFIGURATION: {"data_identifier": cases.name, "architecture": {}}}
    plans = {
        **{"plans_name": "DiffSegPlans", "dataset_name": project.name, "transpose_forward": [2, 0, 1]},
        **{"image_reader_writer": "SimpleITKIO", "configurations": configurations, "diffseg": {"version": 1}},
    }
    project.plans_path.write_text(json.dumps(plans))
    (project.preprocessed / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    rng = np.random.default_rng(0)
    for number in range(6):
        volume = rng.integers(0, 3, SHAPE).astype(np.uint8)
        volume[:2] = 0
        image = sitk.GetImageFromArray(volume.transpose(np.argsort(plans["transpose_forward"])))
        sitk.WriteImage(image, str(labels / f"case_{number}.nii.gz"))
        properties = {
            "shape_before_cropping": SHAPE,
            "bbox_used_for_cropping": [[1, 7], [0, 6], [0, 5]],
            "shape_after_cropping_and_before_resampling": (6, 6, 5),
            "class_locations": {1: np.ones((1, 4)), 2: np.ones((1, 4)), 3: []},
        }
        (cases / f"case_{number}.pkl").write_bytes(pickle.dumps(properties))
    return project


def annotated(project: Project, labels: str, seed: int = 0) -> set[Any]:
    """What a budget annotates: cases, slices of cases, or voxels of cases."""
    fold = draw_budget(project, CONFIGURATION, 0, labels, seed)
    if fold.slices is not None:
        return {(case, number) for case, numbers in fold.slices.items() for number in numbers}
    return set(fold.train)


def splits_of(project: Project) -> list[dict[str, list[str]]]:
    return json.loads((project.preprocessed / "splits_final.json").read_text())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([("cases", 4), ("slices", 20), ("%", 100)]),
    seed=st.integers(0, 2),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_budgets_nest(small: Project, kind: tuple[str, int], seed: int, shares: tuple[float, float]) -> None:
    unit, most = kind
    few, many = (annotated(small, f"{max(1, round(share * most))}{unit}", seed) for share in sorted(shares))
    assert few <= many


def test_a_budget_becomes_the_next_fold(small: Project) -> None:
    folds = ensure_splits(small, CONFIGURATION)
    first = draw_budget(small, CONFIGURATION, 1, "2cases")
    second = draw_budget(small, CONFIGURATION, 1, "3slices", seed=4)
    assert (first.fold, second.fold) == (5, 6)
    assert splits_of(small)[:5] == folds
    assert ensure_splits(small, CONFIGURATION) == splits_of(small)
    for drawn in (first, second):
        assert splits_of(small)[drawn.fold] == {"train": list(drawn.train), "val": folds[1]["val"]}
        assert sorted(drawn.train + drawn.unlabelled) == sorted(folds[1]["train"])
        assert budget_of(small, CONFIGURATION, drawn.fold) == drawn
        assert base_fold(small, CONFIGURATION, drawn.fold) == 1
    assert budget_of(small, CONFIGURATION, 1) is None
    assert [base_fold(small, CONFIGURATION, fold) for fold in (1, "all")] == [1, "all"]


def test_the_same_budget_is_the_same_fold(small: Project) -> None:
    first = draw_budget(small, CONFIGURATION, 0, "50%")
    files = {path: path.read_bytes() for path in small.preprocessed.glob("*.json")}
    assert draw_budget(small, CONFIGURATION, 0, "50.0%") == first
    assert {path: path.read_bytes() for path in small.preprocessed.glob("*.json")} == files
    others = [draw_budget(small, CONFIGURATION, *other) for other in ((1, "50%"), (0, "50%", 1), (0, "2cases"))]
    assert [other.fold for other in others] == [6, 7, 8]


def test_equal_seeds_draw_the_same_in_other_workspaces(small: Project, tmp_path: Path) -> None:
    import shutil

    texts = ("2cases", "5slices", "5%voxels")
    (tmp_path / "copy").mkdir()
    shutil.copytree(small.preprocessed, tmp_path / "copy" / small.name)
    copy = replace(small, workspace=replace(small.workspace, preprocessed=tmp_path / "copy"))
    here = [draw_budget(small, CONFIGURATION, 0, text) for text in texts]
    there = [draw_budget(copy, CONFIGURATION, 0, text) for text in reversed(texts)]
    assert [replace(one, fold=0) for one in here] == [replace(one, fold=0) for one in reversed(there)]


def test_slices_show_labels_and_lie_along_the_first_planned_axis(small: Project) -> None:
    drawn = draw_budget(small, CONFIGURATION, 0, "20slices")
    assert drawn.axis == 2
    assert {number for numbers in drawn.slices.values() for number in numbers} == {2, 3, 4, 5, 6}
    assert sum(map(len, drawn.slices.values())) == 20
    with pytest.raises(BadInputError, match=r"4 training case\(s\) of fold 0 .* have 20 slices that show a .*, not 21"):
        draw_budget(small, CONFIGURATION, 0, "21slices")


@pytest.mark.parametrize("text", ["2cases", "4slices", "10%voxels"])
def test_a_class_without_labels_is_named(small: Project, text: str) -> None:
    assert draw_budget(small, CONFIGURATION, 0, text).missing == ("rare",)


def test_a_voxel_may_miss_a_class(small: Project) -> None:
    drawn = draw_budget(small, CONFIGURATION, 0, "0.0001%voxels")
    assert drawn.missing == ("liver", "spleen", "rare")
    assert drawn.unlabelled == ()


@pytest.mark.parametrize("fold", [0, "0"])
def test_more_than_there_is(small: Project, fold: int | str) -> None:
    assert len(draw_budget(small, CONFIGURATION, fold, "4cases").train) == 4
    with pytest.raises(BadInputError, match=r"Fold 0 of Dataset001_Test has 4 training case\(s\), not 5"):
        draw_budget(small, CONFIGURATION, fold, "5cases")
    assert len(splits_of(small)) == 6


def test_folds_that_nothing_can_be_drawn_from(small: Project) -> None:
    draw_budget(small, CONFIGURATION, 0, "2cases")
    with pytest.raises(BadInputError, match=r"Fold 5 .* is itself a label budget, 2cases of fold 0. Draw from fold 0"):
        draw_budget(small, CONFIGURATION, 5, "1cases")
    with pytest.raises(BadInputError, match="'all' leaves none to validate on"):
        draw_budget(small, CONFIGURATION, "all", "1cases")
    with pytest.raises(BadInputError, match="has folds 0 to 5, not 6"):
        draw_budget(small, CONFIGURATION, 6, "1cases")
    with pytest.raises(BadInputError, match="'a few' is no label budget"):
        draw_budget(small, CONFIGURATION, 0, "a few")


def test_new_cases_end_drawn_folds_and_their_budgets(small: Project) -> None:
    draw_budget(small, CONFIGURATION, 0, "2cases")
    next(small.preprocessed_folder(CONFIGURATION).glob("*.pkl")).unlink()
    assert len(ensure_splits(small, CONFIGURATION)) == 5
    assert "fold 5 is no longer 2cases of fold 0" in small.reporter.warnings[-1]
    assert draw_budget(small, CONFIGURATION, 0, "2cases").fold == 5


def test_own_splits_keep_their_budgets(small: Project) -> None:
    own = [{"train": ["case_0", "case_1", "case_2"], "val": ["case_3"]}]
    (small.preprocessed / "splits_final.json").write_text(json.dumps(own))
    drawn = draw_budget(small, CONFIGURATION, 0, "2slices")
    assert drawn.fold == 1
    assert splits_of(small)[0] == own[0]
    assert budget_of(small, CONFIGURATION, 1) == drawn


def test_a_killed_draw_leaves_nothing_behind(small: Project) -> None:
    """The record is written first: a fold without one would be trained on every label."""
    folds = ensure_splits(small, CONFIGURATION)
    drawn = draw_budget(small, CONFIGURATION, 0, "2slices")
    (small.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    assert draw_budget(small, CONFIGURATION, 0, "3slices").fold == drawn.fold
    assert [entry["labels"] for entry in json.loads((small.preprocessed / "label_budgets.json").read_text())] == [
        "3slices"
    ]


def test_a_killed_draw_is_not_taken_for_a_benchmarks_fold(small: Project) -> None:
    folds = ensure_splits(small, CONFIGURATION)
    draw_budget(small, CONFIGURATION, 0, "2slices")
    (small.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    division = Division(("case_0", "case_1"), ("case_2",))
    assert ensure_fold(small, CONFIGURATION, division) == 5
    assert budget_of(small, CONFIGURATION, 5) is None
    assert draw_budget(small, CONFIGURATION, 5, "1case").fold == 6


def test_a_benchmark_is_of_no_label_budget(small: Project) -> None:
    for name in (f"{part}/case_{number}{end}" for part, end in RAW_FILES for number in range(6)):
        path = small.workspace.raw / small.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (small.workspace.raw / small.name / "dataset.json").write_text(json.dumps(content))
    draw_budget(small, CONFIGURATION, 1, "2slices")
    protocol = PROTOCOLS["few-label"]
    with pytest.raises(BadInputError, match=r"Fold 5 .* 2slices of fold 1. Give --fold 1 --budgets 2slices"):
        divisions(small, protocol.changed(folds=(0, 5)))
    assert len(divisions(small, protocol.changed(folds=(0, 1)))) == 2
    assert len(divisions(small, protocol.changed(folds=None))) == 5


def edited(entries: list[dict[str, Any]], **changes: Any) -> str:
    return json.dumps([{**entries[0], **changes}])


@pytest.mark.parametrize(
    "changes",
    [{"slices": None}, {"slices": {"case_9": [1]}}, {"labels": "some"}, {"train": 3}, {"seed": "x"}, {"fold": None}],
)
def test_a_record_that_is_none(small: Project, changes: dict[str, Any]) -> None:
    draw_budget(small, CONFIGURATION, 0, "2slices")
    path = small.preprocessed / "label_budgets.json"
    path.write_text(edited(json.loads(path.read_text()), **changes))
    with pytest.raises(BadInputError, match=r"label_budgets.json is no record of label budgets: .* ask for"):
        budget_of(small, CONFIGURATION, 5)
    path.write_text("[")
    with pytest.raises(BadInputError, match=r"label_budgets.json is no record of label budgets"):
        budget_of(small, CONFIGURATION, 5)


def test_splits_that_disagree_with_the_record(small: Project) -> None:
    draw_budget(small, CONFIGURATION, 0, "2slices")
    path = small.preprocessed / "splits_final.json"
    splits = splits_of(small)
    path.write_text(json.dumps([*splits[:5], splits[0]]))
    with pytest.raises(BadInputError, match=r"disagree about fold 5 \(2slices of fold 0\)"):
        budget_of(small, CONFIGURATION, 5)


def test_a_record_survives_its_file(small: Project) -> None:
    for text in ("2slices", "1%voxels", "1cases"):
        drawn = draw_budget(small, CONFIGURATION, 0, text)
        assert BudgetFold.from_json(json.loads(json.dumps(drawn.to_json()))) == drawn


def test_which_folds_predict_together(small: Project) -> None:
    """All that are trained in full: not those of budgets, and a model of all cases only where there is no other."""
    draw_budget(small, CONFIGURATION, 0, "2cases")
    budget = len(splits_of(small)) - 1
    folder = small.model_folder("finetune", CONFIGURATION)

    def train(*folds: int | str) -> None:
        for fold in folds:
            (folder / f"fold_{fold}").mkdir(parents=True)
            (folder / f"fold_{fold}" / "checkpoint_final.pth").touch()

    assert trained_folds(small, "finetune", (CONFIGURATION,)) == ()
    train("all", budget)
    assert trained_folds(small, "finetune", (CONFIGURATION,)) == ("all",)
    train(2, 0)
    (folder / "fold_1").mkdir()  # begun
    assert trained_folds(small, "finetune", (CONFIGURATION,)) == (0, 2)
    assert trained_folds(small, "finetune", (CONFIGURATION, "2d")) == ()

    # the folds are drawn anew, and of a budget there is no record but that of its training
    train(1 + budget)
    with small.manifest.running(f"train/finetune/{CONFIGURATION}/fold_{1 + budget}", {}, {"labels": {"base": 0}}):
        pass
    assert trained_folds(small, "finetune", (CONFIGURATION,)) == (0, 2)


@pytest.mark.parametrize("labels", ["4slices", "10%voxels", "2cases"])
def test_what_is_annotated_lies_along_the_plans_axis(labels: str, small: Project) -> None:
    """Another plan may put another axis first: the same numbers are then other slices."""
    drawn = draw_budget(small, CONFIGURATION, 0, labels)
    folder = str(small.preprocessed)
    assert (sparse_annotations(folder, drawn.fold, 2) is None) == (labels == "2cases")
    other = small.plans() | {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    small.plans_path.write_text(json.dumps(other))
    if labels == "2cases":
        assert draw_budget(small, CONFIGURATION, 0, labels) == drawn
        assert sparse_annotations(folder, drawn.fold, 0) is None
        return
    refused = "drawn while slices lay along axis 2 of the images; .* along axis 0"
    with pytest.raises(BadInputError, match=refused):
        draw_budget(small, CONFIGURATION, 0, labels)
    with pytest.raises(BadInputError, match=refused):
        sparse_annotations(folder, drawn.fold, 0)


def test_a_checkpoint_of_a_training_has_learnt_its_folds_labels(small: Project) -> None:
    splits = ensure_splits(small, CONFIGURATION)

    def learnt(**entries: Any) -> set[str]:
        made = {"plans": {"dataset_name": small.name}, "fold": 1, **entries.pop("made", {})}
        return learnt_in_training({"init_args": made, **entries}, small)

    assert learnt() == set(splits[1]["train"])
    assert learnt(made={"plans": {"dataset_name": "Dataset099_Other"}}) == learnt(made={"fold": 99}) == set()
    assert learnt(pool={small.name: ["a"]}, plans={"dataset_name": small.name}, fold=1) == set()
    division = Division(tuple(splits[1]["val"]), tuple(splits[1]["train"]))
    with pytest.raises(BadInputError, match=r"trained on the labels of \d+ test case\(s\)"):
        refuse_seen({}, small.name, division, "x.pth", learnt())


@pytest.mark.pipeline
def test_training_on_a_budget(project: TinyProject) -> None:
    """Drawn, fine-tuned from the base fold's pretraining, trained as twin, predicted and scored by the commands; found
    again, and nothing done twice."""
    diffseg, short = project.diffseg, ("--iterations", 2, "--workers", 0)
    drawn, trained, again, twin, predicted, pretrained, empty = diffseg.in_one_process(
        [
            ("labels", 1, "1case", "4slices", "0.5%voxels"),
            ("train", 1, "--labels", "4slices", *short),
            ("train", 1, "-f", 6, *short),
            ("train", 1, "--labels", "0.5%voxels", "--strategy", "scratch", *short),
            ("predict", "-d", 1, "-i", project.test_images, "-o", project.folder / "out", "-f", 6),
            ("pretrain", 1, "-f", 6, "--iterations", 20, "--seed", 7),
            ("train", 1, "--labels", "99cases", *short),
        ]
    )
    folds = project.splits()
    assert [len(fold["train"]) for fold in folds[5:]] == [1, 4, 4]
    for number, text in itertools.zip_longest((5, 6, 7), ("1case", "4slices", "0.5%voxels")):
        assert f"fold {number} is {text} of fold 0, label seed 0" in drawn.ok().out
    assert "4 slices in 4 of 4 training cases" in drawn.out
    assert "fold 6 is 4slices" in trained.ok().out
    assert "DiffSegPretrainer__DiffSegPlans__3d_fullres/fold_0/checkpoint_final.pth" in trained.out
    assert "fold_6: finished before" in again.ok().out
    for trainer, fold in (("DiffSegTrainer", 6), ("DiffSegTrainerScratch", 7)):
        validation = project.model(trainer) / f"fold_{fold}" / "validation"
        assert sorted(path.name for path in validation.glob("*.nii.gz")) == [f"{c}.nii.gz" for c in folds[0]["val"]]
    assert "fold_7" in twin.ok().out
    predicted.ok()
    assert len(list((project.folder / "out").glob("*.nii.gz"))) == len(list(project.test_images.iterdir()))
    assert "pretrain/3d_fullres/fold_0: finished before" in pretrained.ok().out
    empty.refused("has 4 training case(s), not 99")
    assert json.loads((project.model("DiffSegTrainer") / "dataset.json").read_text())["labels"] == {
        **{"background": 0, "lungs": 1, "left_kidney": 2, "right_kidney": 3}
    }
    recorded = project.stage("train/finetune/3d_fullres/fold_6")["settings"]["labels"]
    assert recorded["labels"] == "4slices"


@pytest.mark.pipeline
def test_a_run_on_a_budget(project: TinyProject) -> None:
    """Each fold is cut down to the budget, in the next run, too; what cannot be drawn is refused before anything."""
    first, again, unknown, everything, drawn = project.diffseg.in_one_process(
        [
            ("run", 1, "--labels", "2cases", "--label-seed", 3, "--iterations", 2, "--workers", 0, "--no-test"),
            ("run", 1, "--no-test"),
            ("run", 1, "--labels", "lots"),
            ("run", 1, "-f", "all"),
            ("run", 1, "-f", 5, "--labels", "1case"),
        ]
    )
    assert "fold 5 is 2cases of fold 0, label seed 3" in first.ok().out
    assert project.stage("train/finetune/3d_fullres/fold_5")["settings"]["labels"]["seed"] == 3
    assert "-c 3d_fullres -f 5" in first.out
    assert "train/finetune/3d_fullres/fold_5: finished before, unchanged" in again.ok().out
    unknown.refused("'lots' is no label budget")
    everything.refused("'all' leaves none to validate on")
    drawn.refused("Fold 5", "is itself a label budget, 2cases of fold 0")
