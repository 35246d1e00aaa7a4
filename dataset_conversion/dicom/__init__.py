"""DICOM: series of CT and MR images, with RTSTRUCT or DICOM SEG objects as labels.

`index` lists what lies in a tree, `selection` picks the image series, `annotations` the objects that label them,
`stack` turns planes into a grid, `series`, `rtstruct` and `segmentation` read voxels. Nothing that stands in a DICOM
file is ever used as a path.
"""
