"""What nnU-Net's own reading, transposing and normalising did to an image is undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from diffseg_nnunet.inference.intensities import channel_intensities, limits
from diffseg_nnunet.inference.patch_images import patch_images

FIGURES = {"mean": 70.0, "std": 130.0, "percentile_00_5": -900.0, "percentile_99_5": 400.0}
ORDERS = [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)]


def configuration(**values: object) -> ConfigurationManager:
    return ConfigurationManager({"architecture": {}, **values})


def read(path: Path, forward: tuple[int, ...]) -> tuple[np.ndarray, list[float]]:
    """Channels and spacing as nnU-Net's preprocessor has them before it resamples."""
    data, properties = SimpleITKIO().read_images([str(path)])
    return data.transpose([0, *(axis + 1 for axis in forward)]), [properties["spacing"][axis] for axis in forward]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("forward", ORDERS)
def test_axes_and_spacing_return(tmp_path: Path, forward: tuple[int, ...], dimensions: int) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32))
    image.SetSpacing((0.7, 0.8, 3.0))
    sitk.WriteImage(image, str(path := tmp_path / "image_0000.nii.gz"))
    data, spacing = read(path, forward)
    plans = PlansManager(
        {
            "transpose_forward": list(forward),
            "transpose_backward": [int(axis) for axis in np.argsort(forward)],
            "original_median_spacing_after_transp": spacing,
        }
    )
    if dimensions == 3:
        found = patch_images(data, plans, configuration(spacing=spacing))
        expected = image
    else:  # slice 2 of the axis that a 2D configuration cuts
        found = patch_images(data[:, 2], plans, configuration(spacing=spacing[1:]))
        cut = 2 - forward[0]  # SimpleITK counts its axes from x
        start = [2 if axis == cut else 0 for axis in range(3)]
        size = [1 if axis == cut else n for axis, n in enumerate(image.GetSize())]
        expected = sitk.RegionOfInterest(image, size, start)
    assert len(found) == 1
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found[0]), sitk.GetArrayFromImage(expected))
    assert found[0].GetSpacing() == pytest.approx(expected.GetSpacing())


def test_every_channel_is_an_image() -> None:
    plans = PlansManager({"transpose_backward": [0, 1, 2]})
    patch = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    first, second = patch_images(patch, plans, configuration(spacing=[3.0, 2.0, 1.0]))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(first), patch[0])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(second), patch[1])
    assert second.GetSpacing() == (1.0, 2.0, 3.0)


def test_ct_returns_to_hounsfield_units_and_the_rest_stays() -> None:
    plans = PlansManager({"foreground_intensity_properties_per_channel": {"0": FIGURES, "1": FIGURES}})
    schemes = configuration(normalization_schemes=["CTNormalization", "ZScoreNormalization"])
    ct, mr = channels = channel_intensities(plans, schemes, 2)
    image = np.random.default_rng(0).uniform(-1500, 1500, (3, 4, 5)).astype(np.float32)
    normalised = CTNormalization(use_mask_for_norm=False, intensityproperties=FIGURES).run(image.copy())
    np.testing.assert_allclose(ct.restored(normalised), image.clip(-900, 400), atol=1e-3)
    assert (ct.unit, mr.unit) == ("HU", "normalised")
    np.testing.assert_array_equal(mr.restored(image), image)

    low, high = limits(channels, 3)
    assert low.shape == high.shape == (2, 1, 1, 1)
    assert low[0].item() == pytest.approx(normalised.min())
    assert high[0].item() == pytest.approx(normalised.max())
    assert torch.isinf(low[1])
    assert torch.isinf(high[1])
    assert limits([mr], 2) is None
    assert mr.to_json()["low"] is None
