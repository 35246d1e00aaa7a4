"""Pretraining in each of its modes, in 2D and 3D."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from scipy.ndimage import binary_erosion, map_coordinates

from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.trainers import DiffSegPretrainer

from .learning import NewTrainer, Weights, assert_same, stock_network, trained, weights_of


def test_an_unlabelled_data_set_can_be_pretrained_on(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, fold="all", dataset=902, iterations=1)
    trained(trainer)
    pool = torch.load(trainer.final_checkpoint, weights_only=True)["pool"]
    assert {source: len(cases) for source, cases in pool.items()} == {"Dataset902_Unlabelled": 4}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_pretraining_without_coordinates(new_trainer: NewTrainer, configuration: str) -> None:
    trainer = new_trainer(DiffSegPretrainer, configuration, iterations=1, coordinates={"mode": "none"})
    trained(trainer)
    assert "coordinate_head_state" not in torch.load(trainer.final_checkpoint, weights_only=True)["phases"]["denoiser"]
    assert "affine" not in next(trainer.dataloader_train)


def test_2d_pretraining_with_coordinates(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, "2d", iterations=2)
    trained(trainer)
    assert "coordinate_head_state" in torch.load(trainer.final_checkpoint, weights_only=True)["phases"]["denoiser"]
    assert np.isfinite([row["validation_coordinates"] for row in trainer.history.rows]).all()


@pytest.mark.parametrize("augment", [False, True])
def test_patches_lie_where_the_scan_says(new_trainer: NewTrainer, project: Project, augment: bool) -> None:
    """The brightness of the raw scan at each voxel's position is the brightness of the patch."""
    trainer = new_trainer(DiffSegPretrainer, augment=augment)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    loader.start_at(0, 0, 0, 1)
    for _ in range(4):
        batch = next(loader)
        for index, key in enumerate(batch["keys"]):
            source, case = key.split("/")
            folder = "imagesTr" if source == project.name else "imagesUn"
            raw = sitk.ReadImage(str(project.workspace.raw / source / folder / f"{case}_0000.nii.gz"))
            voxels = np.argwhere(binary_erosion(batch["mask"][index, 0].numpy(), np.ones((3, 3, 3))))[::5]
            affine = batch["affine"][index].numpy()
            positions = voxels @ affine[:, :3].T + affine[:, 3]
            patch = batch["data"][index, 0].numpy()[tuple(voxels.T)]

            def alike(offset_mm: tuple[float, ...], positions=positions, raw=raw, patch=patch) -> float:
                places = [raw.TransformPhysicalPointToContinuousIndex(p) for p in (positions + offset_mm).tolist()]
                there = map_coordinates(sitk.GetArrayFromImage(raw).astype(float), np.asarray(places).T[::-1], order=1)
                return np.corrcoef(there, patch)[0, 1]

            # brighter or darker, and interpolated once more, the sharpest likeness may be off by a part of a voxel
            here, far = alike((0, 0, 0)), 10 if augment else 4
            assert here > (0.85 if augment else 0.95)
            for axis in range(3):
                for side in (-far, far):
                    assert alike(tuple(side * (axis == other) for other in range(3))) < here


def test_guidance_trains_the_regressor_then_the_denoiser(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, iterations=4, coordinates={"mode": "guidance", "regressor_share": 0.5})
    trainer.initialize()
    start = weights_of(trainer)
    snapshots = []
    trainer.progress = lambda _done, _total, news: None if news else snapshots.append(weights_of(trainer))
    trainer.run_training()

    def changed(one: Weights, other: Weights, module: str) -> bool:
        return any(not torch.equal(one[key], other[key]) for key in one if key.startswith(module))

    for index, (before, after) in enumerate(zip([start, *snapshots], snapshots, strict=False)):
        # epoch 2 is the first of the denoiser; from there on the regressor is what its average was
        assert changed(before, after, "regressor.") == (index < 3), index
        assert changed(before, after, "ema.regressor.") == (index < 2), index
        assert changed(before, after, "network.") == changed(before, after, "ema.network.") == (index >= 2), index
        assert changed(before, after, "conditioning.") == (index >= 2), index
    end = snapshots[-1]
    averages = [key for key in end if key.startswith("ema.regressor.")]
    assert all(torch.equal(end[key.removeprefix("ema.")], end[key]) for key in averages)

    rows = trainer.history.rows
    assert ["validation_denoising" in row for row in rows] == [False, False, True, True]
    assert ["validation_coordinates" in row for row in rows] == [True, True, False, False]


def test_guidance_leaves_a_stock_network(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, iterations=3, coordinates={"mode": "guidance"})
    trained(trainer)
    content = torch.load(trainer.final_checkpoint, weights_only=True)
    assert content["phases"].keys() == {"regressor", "denoiser"}
    stock = stock_network(trainer, 1)
    stock.load_state_dict(content["network_weights"], strict=True)
    patch = torch.randn((2, 1, *trainer.patch_size), generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), trainer.settings.diffusion.fold_timestep)
    with torch.no_grad(), trainer.phases[-1].ema.applied():
        expected = trainer.denoiser(patch, t)  # no map
        guided = trainer.denoiser(patch, t, trainer.denoiser.coordinate_map(patch))
    spread = expected.max() - expected.min()
    with torch.no_grad():
        assert (stock(patch) - expected).abs().max() <= 1e-4 * spread
    assert (guided - expected).abs().max() > 1e-3 * spread
    load_pretrained_weights(stock_network(trainer, len(LABELS)), str(trainer.final_checkpoint))


@pytest.mark.parametrize(("configuration", "mode"), [("2d", "none"), ("2d", "guidance"), ("3d_fullres", "auxiliary")])
def test_pictures_are_drawn_now_and_then(new_trainer: NewTrainer, configuration: str, mode: str) -> None:
    trainer = new_trainer(DiffSegPretrainer, configuration, iterations=4, pictures=2, coordinates={"mode": mode})
    weights, undrawn = (
        trained(trainer),
        new_trainer(DiffSegPretrainer, configuration, iterations=4, coordinates={"mode": mode}),
    )
    pictures = sorted((trainer.results_folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["epoch_0001.png", "epoch_0003.png"]
    columns = 3 if mode == "none" else 4
    for path in pictures:
        picture = imread(path)
        assert picture.ndim == 3
        assert picture.shape[1] > picture.shape[0] * columns / 3
        assert picture[..., :3].std() > 0.05
    # nothing is learned from drawing
    assert_same(trained(undrawn), weights)
