"""What a record says of the voxels, against numpy; and that it does not depend on how they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification import CaseRecord, check_case
from diffseg_nnunet.verification.voxels import digest, distribution, value_counts
from tests.verification.conftest import noise, oblique, organs, write

SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)
WHOLE = hnp.arrays(np.int16, SHAPES)
FLOATS = hnp.arrays(np.float32, SHAPES, elements=st.floats(-1e4, 1e4, width=32))


@given(WHOLE)
def test_whole_numbers_are_the_same_in_every_type(voxels: np.ndarray) -> None:
    expected = distribution(voxels)
    for kind in (np.int32, np.int64, np.float32, np.float64, ">i2", ">f4"):
        stored = voxels.astype(kind)
        assert digest(stored) == digest(voxels)
        assert distribution(stored) == expected
        assert value_counts(stored) == value_counts(voxels)


@given(st.one_of(WHOLE, FLOATS))
def test_distribution_is_numpys(voxels: np.ndarray) -> None:
    found = distribution(voxels)
    assert (found.minimum, found.maximum) == (voxels.min(), voxels.max())
    assert found.mean == pytest.approx(voxels.mean(dtype=np.float64), rel=1e-9, abs=1e-6)
    exact = np.percentile(voxels.astype(np.float64), (0.5, 50, 99.5), method="inverted_cdf")
    np.testing.assert_array_equal(found.percentiles, exact)
    assert found.whole_numbers == bool(np.all(voxels == np.rint(voxels)))


@given(FLOATS, st.data())
def test_a_digest_sees_any_voxel_and_the_shape(voxels: np.ndarray, data: st.DataObject) -> None:
    where = tuple(data.draw(st.integers(0, extent - 1)) for extent in voxels.shape)
    changed = voxels.copy()
    changed[where] += 1
    assert digest(changed) != digest(voxels)
    assert digest(-np.zeros(voxels.shape, np.float32)) == digest(np.zeros(voxels.shape, np.uint8))
    if voxels.size > 1:
        assert digest(voxels.reshape(1, 1, -1)) != digest(voxels.reshape(-1, 1, 1))


def test_wide_ranges_and_nan_are_counted() -> None:
    wide = np.array([[[0, 1 << 20, 1 << 20, 5]]], np.int32)
    assert value_counts(wide) == {0: 1, 5: 1, 1 << 20: 2}
    assert distribution(wide).percentiles == (0.0, 5.0, float(1 << 20))
    assert len(value_counts(np.array([[[np.nan, np.nan, 1.0]]]))) == 2


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha"]), st.sampled_from([np.int16, np.float32, np.float64]))
def test_a_record_does_not_depend_on_the_format(
    tmp_path_factory: pytest.TempPathFactory, ending: str, kind: type
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    voxels = (noise() * 500).astype(np.int16)
    records = []
    for path, stored in ((folder / "a.nii.gz", voxels), (folder / f"b{ending}", voxels.astype(kind))):
        write(path, stored)
        records.append(check_case(Case("case", (path,), None), channel_count=1, label_values=None).record)
    first, second = records
    assert second.channels[0].digest == first.channels[0].digest
    assert second.channels[0].percentile_99_5 == first.channels[0].percentile_99_5
    assert (second.size, second.orientation) == (first.size, first.orientation)
    np.testing.assert_allclose(second.spacing_mm, first.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(second.direction, first.direction, atol=1e-6)


def test_a_record_and_its_json(case: Case) -> None:
    record = check_case(case, channel_count=1, label_values={0, 1, 2}, role="test").record
    assert CaseRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    spacing, origin, direction = oblique(0)
    assert (record.case, record.role, record.size) == ("liver_1", "test", (9, 8, 7))
    np.testing.assert_allclose(record.spacing_mm, spacing[::-1], rtol=1e-6)
    np.testing.assert_allclose(record.origin_mm, origin, rtol=1e-5)
    np.testing.assert_allclose(record.direction, direction, atol=1e-6)
    voxel_ml = np.prod(spacing) / 1000
    assert record.label.volumes_ml == pytest.approx({1: (organs() == 1).sum() * voxel_ml, 2: 112 * voxel_ml}, rel=1e-5)


def test_a_case_that_cannot_be_read_has_no_record_and_a_case_without_its_label_has(case: Case) -> None:
    case.label.write_bytes(b"")
    examination = check_case(case, channel_count=1, label_values=None)
    assert [finding.code for finding in examination.findings] == ["unreadable"]
    assert examination.record.label is None
    case.images[0].unlink()
    assert check_case(case, channel_count=1, label_values=None).record is None
    sitk.WriteImage(sitk.Image((3, 3), sitk.sitkInt16), str(case.images[0].with_suffix(".nrrd")))
    flat = Case("flat", (Path(case.images[0].with_suffix(".nrrd")),), None)
    assert check_case(flat, channel_count=1, label_values=None).record is None
