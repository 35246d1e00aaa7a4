"""``diffseg sample`` as its users run it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline


def test_samples_from_the_command_line(project: TinyProject) -> None:
    options = ("sample", "-d", 1, "--count", 2, "--steps", 3, "--seed", 5)
    kernels = json.loads((project.preprocessed / "DiffSegPlans.json").read_text())["configurations"]["3d_fullres"][
        "architecture"
    ]["arch_kwargs"]["strides"]
    size = [int(2 * stride) for stride in np.prod(kernels, axis=0)]
    checkpoint = project.pretrained() / "checkpoint_final.pth"
    first, second = project.diffseg.in_one_process(
        [
            (*options, "--size", *size, "-o", "first"),
            (*options, "--sampler", "ddpm", "--checkpoint", checkpoint, "-o", "second"),
        ]
    )
    assert "samples: first, intensities: HU" in first.ok().out
    assert "samples: second" in second.ok().out
    for folder in ("first", "second"):
        found = {path.name for path in (project.folder / folder).iterdir()}
        assert found == {"sample_000.nii.gz", "sample_001.nii.gz", "samples.png", "samples.json"}
    record = json.loads((project.folder / "first" / "samples.json").read_text())
    assert (record["size"], record["seed"], record["sampler"]["steps"]) == (size, 5, 3)
    image = sitk.ReadImage(str(project.folder / "first" / "sample_000.nii.gz"))
    assert sorted(image.GetSize()) == sorted(size)
    assert image.GetSpacing() == pytest.approx((14, 14, 14))
