"""`read_volume` gives what SimpleITK reads, in every kind of NIfTI file; what SimpleITK reads wrongly is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg_nnunet.verification import UnreadableVolumeError, read_volume

TYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
SCALES = [(np.nan, np.nan), (1, 0), (0, 0), (0, 5), (1, -1024), (2, 0), (0.5, 3)]


def same_as_simpleitk(path: Path) -> sitk.Image:
    image, expected = read_volume(path), sitk.ReadImage(str(path))
    assert image.GetPixelID() == expected.GetPixelID()
    assert image.GetNumberOfComponentsPerPixel() == expected.GetNumberOfComponentsPerPixel()
    assert image.GetSize() == expected.GetSize()
    assert image.GetSpacing() == expected.GetSpacing()
    assert image.GetOrigin() == expected.GetOrigin()
    assert image.GetDirection() == expected.GetDirection()
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(expected))
    # what SimpleITK notes of its own reading besides is no part of the file
    kept = {key for key in expected.GetMetaDataKeys() if not key.startswith("ITK_original_")}
    found = {key for key in image.GetMetaDataKeys() if not key.startswith("ITK_original_")}
    assert {key: image.GetMetaData(key) for key in found} == {key: expected.GetMetaData(key) for key in kept}
    return image


def affine(rng: np.random.Generator) -> np.ndarray:
    turned = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.5, 4, 3)
    return np.block([[turned, rng.normal(0, 100, (3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    order=st.sampled_from("<>"),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    scale=st.sampled_from(SCALES),
    codes=st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, 2])),
    extension=st.booleans(),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_scalar_file(tmp_path_factory, kind, order, shape, scale, codes, extension, ending, seed):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 120, shape).astype(order + kind)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(shape)
    matrix = affine(rng)
    header.set_qform(matrix, codes[0], strip_shears=True)
    header.set_sform(matrix, codes[1])
    header["scl_slope"], header["scl_inter"] = scale
    header["magic"], header["vox_offset"] = b"n+1", 384 if extension else 352
    path = tmp_path_factory.mktemp("volume") / f"case{ending}"
    content = header.binaryblock + bytes(int(header["vox_offset"]) - 348) + voxels.tobytes(order="F")
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    same_as_simpleitk(path)


@pytest.mark.parametrize("components", [sitk.sitkVectorUInt8, sitk.sitkComplexFloat32, sitk.sitkVectorFloat32])
def test_voxels_that_are_several_numbers(tmp_path, components):
    image = sitk.Image([4, 3, 2], components)
    sitk.WriteImage(image, str(tmp_path / "case.nii.gz"))
    same_as_simpleitk(tmp_path / "case.nii.gz")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats(tmp_path, ending):
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetSpacing((1, 2, 3))
    sitk.WriteImage(image, str(tmp_path / f"case{ending}"), True)
    same_as_simpleitk(tmp_path / f"case{ending}")


def test_two_gzip_members_and_a_name_without_compression(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), tmp_path / "plain.nii")
    content = (tmp_path / "plain.nii").read_bytes()
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    (tmp_path / "stored.nii.gz").write_bytes(content)
    for name in ("members.nii.gz", "stored.nii.gz"):
        assert sitk.GetArrayFromImage(same_as_simpleitk(tmp_path / name)).sum() == 60 * 59 // 2


def test_the_image_owns_its_voxels_and_can_be_written(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), tmp_path / "case.nii.gz")
    image = read_volume(tmp_path / "case.nii.gz")
    (tmp_path / "case.nii.gz").unlink()
    image += 1
    sitk.WriteImage(image, str(tmp_path / "new.nii.gz"))
    np.testing.assert_array_equal(
        np.asanyarray(nib.load(tmp_path / "new.nii.gz").dataobj).ravel("F").tolist(),
        (np.arange(60).reshape(3, 4, 5) + 1).ravel("F").tolist(),
    )


def test_a_compressed_file_under_a_name_without_gz(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "case.nii.gz")
    (tmp_path / "case.nii.gz").rename(tmp_path / "case.nii")
    with pytest.raises(UnreadableVolumeError, match=r"does not end with \.gz") as caught:
        read_volume(tmp_path / "case.nii")
    assert caught.value.mend == "Rename it case.nii.gz."


def test_a_header_that_promises_more_than_any_memory_holds(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "case.nii")
    content = bytearray((tmp_path / "case.nii").read_bytes())
    struct.pack_into("<4h", content, 40, 3, 32767, 32767, 32767)
    (tmp_path / "case.nii").write_bytes(content)
    with pytest.raises(UnreadableVolumeError, match=r"it is truncated, \d+ of \d+ bytes of its voxels are missing"):
        read_volume(tmp_path / "case.nii")
