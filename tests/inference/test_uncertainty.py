"""Uncertainty maps: slab by slab they are what the whole image gives, on the segmentation's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffseg_nnunet.inference.uncertainty import Measure, entropy, measured, write_map
from diffseg_nnunet.probing.ensemble import vote_entropy


@pytest.mark.parametrize("measure", [entropy(False), entropy(True), vote_entropy])
@pytest.mark.parametrize("slices", [1, 8, 19])
def test_a_map_is_the_measure_of_the_whole_image(tmp_path: Path, measure: Measure, slices: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn((3, slices, 5, 4), generator=generator).mul(0.3).softmax(0)
    segmentation = sitk.GetImageFromArray(np.zeros((slices, 5, 4), np.uint8))
    segmentation.SetSpacing((0.5, 0.6, 3.0))
    segmentation.SetOrigin((1.0, -2.0, 3.0))
    sitk.WriteImage(segmentation, str(tmp_path / "case.nii.gz"))
    write_map(measured(probabilities.numpy(), measure), tmp_path / "case", ".nii.gz")
    written = sitk.ReadImage(str(tmp_path / "uncertainty" / "case.nii.gz"))
    assert written.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_allclose(written.GetSpacing(), (0.5, 0.6, 3.0), rtol=1e-6)
    np.testing.assert_allclose(written.GetOrigin(), (1.0, -2.0, 3.0), rtol=1e-6)
    torch.testing.assert_close(torch.from_numpy(sitk.GetArrayFromImage(written)), measure(probabilities).float())
