"""nnU-Net's fingerprint, also of a data set without a single label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import Case, RawDataset

INTENSITY_SAMPLES = 10_000_000
"""Foreground voxels per channel for the intensity statistics. nnU-Net keeps 1e8 (2 GiB while it runs); percentiles of
1e7 are as good."""
_CT_BODY_HU = -500.0  # air and lung below, everything solid above


class DiffSegFingerprintExtractor(DatasetFingerprintExtractor):
    """nnU-Net's extractor for labelled data sets; for unlabelled ones the body stands in for the foreground."""

    def __init__(self, dataset_name_or_id: str | int, num_processes: int = 8, verbose: bool = False):
        super().__init__(dataset_name_or_id, num_processes, verbose)
        self.num_foreground_voxels_for_intensitystats = INTENSITY_SAMPLES
        self.show_progress_bar = False

    def run(self, overwrite_existing: bool = False) -> dict[str, Any]:
        if self.dataset:
            return super().run(overwrite_existing)
        raw = RawDataset.open(self.input_folder)
        cases = raw.unlabelled_cases()
        if not cases:
            raise BadInputError(f"{raw.folder} has no images.", "Convert the data set again with `diffseg convert`.")
        fingerprint = unlabelled_fingerprint(raw, cases)
        write_json(Path(str(nnUNet_preprocessed)) / self.dataset_name / "dataset_fingerprint.json", fingerprint)
        return fingerprint


def unlabelled_fingerprint(raw: RawDataset, cases: list[Case]) -> dict[str, Any]:
    """A fingerprint in nnU-Net's format from images alone.

    Intensities are those of the body: above -500 HU in CT, non-zero otherwise.
    """
    reader = determine_reader_writer_from_dataset_json(raw.dataset_json, str(cases[0].images[0]), verbose=False)()
    per_case = INTENSITY_SAMPLES // len(cases)
    spacings, shapes, shares, samples = [], [], [], []
    for number, case in enumerate(cases):
        images, properties = reader.read_images([str(path) for path in case.images])
        cropped, _, _ = crop_to_nonzero(images, None)
        spacings.append([float(s) for s in properties["spacing"]])
        shapes.append([int(n) for n in cropped.shape[1:]])
        shares.append(float(np.prod(cropped.shape[1:]) / np.prod(images.shape[1:])))
        samples.append(_body_sample(cropped, list(raw.channel_names.values()), per_case, seed=number))
    statistics = {
        str(channel): _statistics(np.concatenate([sample[channel] for sample in samples]))
        for channel in range(len(raw.channel_names))
    }
    return {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": statistics,
        "median_relative_size_after_cropping": float(np.median(shares)),
    }


def _body_sample(images: np.ndarray, channel_names: list[str], count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sample = []
    for image, name in zip(images, channel_names, strict=True):
        body = image[image > _CT_BODY_HU] if name.lower() == "ct" else image[image != 0]
        body = body if body.size else image.reshape(-1)
        sample.append(rng.choice(body, min(count, body.size), replace=False))
    return sample


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [0.5, 50.0, 99.5])
    return {
        "mean": float(values.mean()),
        "median": float(median),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }
