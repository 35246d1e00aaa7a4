"""A fold that is annotated in part: no label outside of the annotation has any influence, in 2D and in 3D."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from diffseg_nnunet.budgets.annotation import ScanGrid, SliceAnnotation
from diffseg_nnunet.budgets.folds import BudgetFold
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.label_budgets import draw_budget
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.trainers import DiffSegTrainer, DiffSegTrainerScratch
from diffseg_nnunet.trainers.loaders import SeededLoader
from diffseg_nnunet.trainers.sparse import SparseSegmentation, keep_single_voxels
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

NewTrainer = Callable[..., Any]
CONFIGURATIONS = ("2d", "3d_fullres")
BUDGETS = ("3slices", "2%voxels")


@pytest.fixture
def workspace(phantom_workspace: Workspace, tmp_path: Path, one_thread: None) -> Iterator[Workspace]:
    """Active, with splits and results of its own."""
    with environment_restored():
        shutil.copytree(phantom_workspace.preprocessed, tmp_path / "preprocessed")
        yield replace(
            phantom_workspace, preprocessed=tmp_path / "preprocessed", results=tmp_path / "results"
        ).activate()


@pytest.fixture
def drawn(project: Project) -> Callable[[str], BudgetFold]:
    return lambda text: draw_budget(project, "3d_fullres", 0, text)


def initialised(new_trainer: NewTrainer, fold: BudgetFold, configuration: str, **settings: Any) -> Any:
    trainer = new_trainer(DiffSegTrainer, configuration, fold.fold, **settings)
    trainer.initialize()
    return trainer


def stock(trainer: Any, case: str) -> tuple[np.ndarray, dict[str, Any]]:
    """All labels of a case, and its properties, as preprocessing wrote them."""
    dataset = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder, [case])
    _, segmentation, _, properties = dataset.load_case(case)
    return segmentation[:], properties


def visible(trainer: Any, case: str) -> np.ndarray:
    """Labels of a training case as they are loaded."""
    return trainer.get_tr_and_val_datasets()[0].load_case(case)[1][:]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_annotated_slices_are_seen_and_no_others(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], configuration: str
) -> None:
    fold = drawn("3slices")
    trainer = initialised(new_trainer, fold, configuration)
    ignore = trainer.label_manager.ignore_label
    assert list(trainer.get_tr_and_val_datasets()[0].identifiers) == sorted(fold.train)
    for case in fold.train:
        labels, properties = stock(trainer, case)
        seen = visible(trainer, case)
        assert seen.dtype == labels.dtype
        annotated = (seen != ignore).all(axis=(0, 2, 3))
        assert np.array_equal(seen[:, annotated], labels[:, annotated])
        assert (seen[:, ~annotated] == ignore).all()
        # where the annotated ones lie, by the positions of their centres in the scan
        crop, (lower, _) = (
            properties["shape_after_cropping_and_before_resampling"][0],
            (properties["bbox_used_for_cropping"][0]),
        )
        centres = (np.arange(len(annotated)) + 0.5) * crop / len(annotated) - 0.5 + lower
        distance = np.abs(centres[:, None] - np.array(fold.slices[case]))
        assert annotated[distance.argmin(axis=0)].all()
        assert (distance[annotated].min(axis=1) <= max(0.5, crop / len(annotated) / 2)).all()
        if configuration == "2d":
            assert annotated.sum() == len(fold.slices[case])


@pytest.mark.parametrize(("highest", "dtype"), [(14, np.int8), (127, np.int16), (300, np.int16)])
def test_the_ignore_label_fits_beside_many_labels(highest: int, dtype: type) -> None:
    """nnU-Net keeps labels up to 127 as int8."""
    labels = np.full((1, 2, 3, 4), highest, np.int8 if highest < 128 else np.int16)
    grid = ScanGrid((2, 3, 4), (0, 0, 0), (2, 3, 4), (2, 3, 4))
    seen = SparseSegmentation(labels, SliceAnnotation((1,)), grid, highest + 1)
    values = seen[:]
    assert seen.dtype == values.dtype == dtype
    assert (values[:, 0] == highest + 1).all()
    assert (values[:, 1:] == highest).all()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_annotated_voxels_are_seen_and_no_others(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], configuration: str
) -> None:
    trainer = initialised(new_trainer, drawn("2%voxels"), configuration)
    for case in trainer.get_tr_and_val_datasets()[0].identifiers:
        labels, seen = stock(trainer, case)[0], visible(trainer, case)
        annotated = seen != trainer.label_manager.ignore_label
        assert np.array_equal(seen[annotated], labels[annotated])
        assert annotated.mean() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_are_centred_on_annotated_voxels(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], configuration: str, budget: str
) -> None:
    """With patches of one voxel, each is the one that was chosen; stock sampling from all labels would hit others."""
    trainer = initialised(new_trainer, drawn(budget), configuration)
    training, _ = trainer.get_tr_and_val_datasets()
    size = (1,) * len(trainer.configuration_manager.patch_size)
    loader = SeededLoader(training, 60, size, size, trainer.label_manager, oversample_foreground_percent=0.5)
    targets = next(loader.start_at(0, 0, 0, 1))["target"].flatten()
    assert (targets != trainer.label_manager.ignore_label).all()
    assert (targets[30:] > 0).all()
    assert (targets[:30] == 0).any()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_no_other_label_reaches_a_batch(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], configuration: str, budget: str
) -> None:
    """Had somebody labelled everything else otherwise, augmented batches were the same, bit for bit."""
    fold = drawn(budget)
    trainer = initialised(new_trainer, fold, configuration)

    def batches() -> list[dict[str, Any]]:
        del trainer.__dict__["_annotated_cases"]
        loader = trainer.build_loaders()[0].start_at(3, 0, 0, 1)
        return [next(loader) for _ in range(2)]

    trainer.build_loaders()
    before = batches()
    assert any((target != 0).any() for target in before[0]["target"])
    rng = np.random.default_rng(0)
    for case in fold.train:
        path = Path(trainer.preprocessed_dataset_folder) / case
        data = np.array(nnUNetDatasetBlosc2(str(path.parent), [case]).load_case(case)[0][:])
        labels, properties = stock(trainer, case)
        hidden = visible(trainer, case) == trainer.label_manager.ignore_label
        labels = np.where(hidden, rng.integers(-1, 4, labels.shape), labels).astype(labels.dtype)
        properties["class_locations"] = {key: np.zeros((1, 4), int) for key in properties["class_locations"]}
        for old in path.parent.glob(f"{case}*"):
            old.unlink()
        size = {"chunks": data.shape, "blocks": data.shape}
        nnUNetDatasetBlosc2.save_case(data, labels, properties, str(path), **size)
    for one, other in zip(before, batches(), strict=True):
        assert torch.equal(one["data"], other["data"])
        assert all(torch.equal(*pair) for pair in zip(one["target"], other["target"], strict=True))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_loss_sees_what_is_annotated_alone(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], configuration: str, budget: str, regions: bool
) -> None:
    trainer = new_trainer(DiffSegTrainer, configuration, drawn(budget).fold)
    if regions:
        highest = max(trainer.dataset_json["labels"].values())
        named = {"background": 0, "all": list(range(1, highest + 1)), "last": [highest]}
        trainer.dataset_json = {**trainer.dataset_json, "labels": named, "regions_class_order": [1, highest]}
        trainer.label_manager = trainer.plans_manager.get_label_manager(trainer.dataset_json)
    heads = trainer.label_manager.num_segmentation_heads
    trainer.initialize()
    assert trainer.label_manager.num_segmentation_heads == heads
    batch = next(trainer.build_loaders()[0].start_at(0, 0, 0, 1))
    with torch.no_grad():
        outputs = trainer.network(batch["data"])
    assert outputs[0].shape[1] == heads
    outputs = [output.requires_grad_() for output in outputs]
    trainer.loss(outputs, batch["target"]).backward()
    learnt = 0
    for output, target in zip(outputs, batch["target"], strict=True):
        hidden = target[:, -1:] if regions else target == trainer.label_manager.ignore_label
        hidden = hidden.bool().expand_as(output)
        if output.grad is not None:
            assert torch.count_nonzero(output.grad[hidden]) == 0
            learnt += torch.count_nonzero(output.grad[~hidden])
    assert hidden.any() == ((configuration, budget) != ("2d", "3slices"))  # there, patches are annotated slices
    assert learnt > 0


def test_validation_and_the_model_know_of_no_annotation(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold]
) -> None:
    fold = drawn("1slices")
    trainer = initialised(new_trainer, fold, "3d_fullres", iterations=1)
    _, validation = trainer.get_tr_and_val_datasets()
    assert list(validation.identifiers) == sorted(fold.val)
    for case in fold.val:
        assert np.array_equal(validation.load_case(case)[1][:], stock(trainer, case)[0])
    batch = next(trainer.build_loaders()[1].start_at(0, 0, 0, 1))
    assert not any((target == trainer.label_manager.ignore_label).any() for target in batch["target"])

    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))
    checkpoint = torch.load(trainer.final_checkpoint, weights_only=False)
    assert "ignore" not in checkpoint["init_args"]["dataset_json"]["labels"]
    saved = json.loads((trainer.results_folder.parent / "dataset.json").read_text())
    assert saved["labels"] == trainer.dataset_json["labels"]
    assert "ignore" not in saved["labels"]


@pytest.mark.parametrize("budget", ["2cases", "50%"])
def test_whole_cases_are_trained_on_as_ever(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], budget: str
) -> None:
    fold = drawn(budget)
    trainer = initialised(new_trainer, fold, "3d_fullres")
    assert not trainer.label_manager.has_ignore_label
    training, _ = trainer.get_tr_and_val_datasets()
    assert isinstance(training, nnUNetDatasetBlosc2)
    assert list(training.identifiers) == sorted(fold.train)


def test_an_ignore_label_of_the_data_set_is_kept(new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold]) -> None:
    trainer = new_trainer(DiffSegTrainerScratch, "3d_fullres", drawn("2%voxels").fold)
    highest = max(trainer.dataset_json["labels"].values())
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if value != highest}
    trainer.dataset_json = {**trainer.dataset_json, "labels": {**labels, "ignore": highest}}
    trainer.initialize()
    assert trainer.label_manager.ignore_label == highest


def test_coordinates_are_learned_from_whole_patches(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold]
) -> None:
    """Whatever is annotated in them."""
    trainer = initialised(
        new_trainer, drawn("2slices"), "3d_fullres", iterations=1, keep_coordinates=0.5, precision="float32"
    )
    assert trainer.annotations is not None
    loader, _ = trainer.build_loaders()
    assert next(loader.start_at(0, 0, 0, 1))["inside"].all()
    trainer.run_training()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.regulariser.head.parameters())


def test_lone_voxels_survive_turning() -> None:
    """They outvote no neighbour by interpolation; of the nearest voxels, as many are annotated as before."""
    torch.manual_seed(0)
    labels = torch.where(torch.rand(1, 24, 24, 24) < 0.02, 1, 2).to(torch.int16)
    spatial = SpatialTransform((24, 24, 24), 0, False, p_rotation=1, rotation=(0.4, 0.5), padding_value_seg=2)
    composed = ComposeTransforms([spatial])

    def share() -> float:
        turned = [composed(image=torch.zeros(1, 24, 24, 24), segmentation=labels)["segmentation"] for _ in range(4)]
        return float((torch.stack(turned) == 1).float().mean() / (labels == 1).float().mean())

    assert share() < 0.6
    keep_single_voxels(composed)
    assert share() > 0.7  # corners are turned out of the patch


def test_a_cascade_is_refused(new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold]) -> None:
    trainer = new_trainer(DiffSegTrainer, "3d_fullres", drawn("1slices").fold)
    trainer.is_cascaded = True
    with pytest.raises(BadInputError, match="3d_fullres is a cascade, which does not learn from cases annotated in"):
        trainer.initialize()


def test_a_record_that_lies_is_refused(
    new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold], project: Project
) -> None:
    """Also where nnU-Net's own command builds the trainer."""
    fold = drawn("1slices")
    path = project.preprocessed / "splits_final.json"
    splits = json.loads(path.read_text())
    path.write_text(json.dumps([*splits[: fold.fold], splits[0]]))
    with pytest.raises(BadInputError, match="disagree about fold"):
        new_trainer(DiffSegTrainer, "3d_fullres", fold.fold).initialize()


def test_properties_on_the_disk_are_left_alone(new_trainer: NewTrainer, drawn: Callable[[str], BudgetFold]) -> None:
    fold = drawn("1slices")
    trainer = initialised(new_trainer, fold, "2d")
    training, _ = trainer.get_tr_and_val_datasets()
    path = Path(trainer.preprocessed_dataset_folder) / f"{fold.train[0]}.pkl"
    before = load_pickle(str(path))["class_locations"]
    assert training.load_case(fold.train[0])[3]["class_locations"].keys() != before.keys()
    assert load_pickle(str(path))["class_locations"].keys() == before.keys()
