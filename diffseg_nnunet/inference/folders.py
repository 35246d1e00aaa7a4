"""Folders of a trained fold that hold predictions of its validation cases."""

VALIDATION = "validation"
"""nnU-Net's name."""
SEGMENTOR_ALONE = "validation_segmentor"
"""Beside a refiner's: by the segmentor that learnt in turn with it, without the refiner."""
