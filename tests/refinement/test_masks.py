"""Labels to masks and back, with classes that exclude each other and with regions that overlap."""

from __future__ import annotations

import torch

from diffseg_nnunet.refinement.masks import labels_of, masks_of

BRATS_REGIONS = ((1, 2, 3), (2, 3), (3,))  # whole tumour, core, enhancing


def label_map(dimensions: int, highest: int = 3) -> torch.Tensor:
    shape = (2, 1, *(5, 4, 3)[:dimensions])
    return torch.randint(0, highest + 1, shape, generator=torch.Generator().manual_seed(0))


def test_classes_are_one_hot_with_the_background() -> None:
    for labels in (label_map(2), label_map(3)):
        masks = masks_of(labels, range(4))
        expected = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1).float()
        assert torch.equal(masks, expected)
        assert torch.equal(labels_of(masks), labels)


def test_regions_overlap_and_are_written_in_their_order() -> None:
    labels = label_map(3)
    masks = masks_of(labels, BRATS_REGIONS)
    assert masks.shape == (2, 3, 5, 4, 3)
    for mask, values in zip(masks.unbind(1), BRATS_REGIONS, strict=True):
        assert torch.equal(mask.bool(), sum(labels[:, 0] == value for value in values).bool())
    assert torch.equal(labels_of(masks, region_values=(1, 2, 3)), labels)


def test_ignored_labels_are_in_no_mask() -> None:
    labels = label_map(2, highest=4)
    assert (masks_of(labels, range(4)).sum(1, keepdim=True) == (labels != 4)).all()
