"""Which of the two ways of naming images and labels a folder follows, and names of data sets that nnU-Net can use."""

from __future__ import annotations

import re
from pathlib import Path

from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, split_ending, visible_files


def plain_pairs(folder: Path) -> set[str]:
    """Stems that imagesTr and labelsTr share, as in the Medical Segmentation Decathlon."""
    return _stems(folder / "imagesTr") & _stems(folder / "labelsTr")


def pairs_with_channel_numbers(folder: Path) -> set[str]:
    """Stems of labelsTr that imagesTr has with ``_0000``, as in nnU-Net."""
    images = _stems(folder / "imagesTr")
    return {stem for stem in _stems(folder / "labelsTr") if f"{stem}_0000" in images}


def usable_name(name: str, otherwise: str) -> str:
    """The name with '_' between its letters, digits and single hyphens; `otherwise` where it has none of them."""
    return "_".join(re.findall(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*", name)) or otherwise


def _stems(folder: Path) -> set[str]:
    return {split_ending(path.name)[0] for path in visible_files(folder, VOLUME_ENDINGS)}
