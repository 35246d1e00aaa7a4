"""Label maps by the rules of the protocols that are not FLARE's (see test_flare.py)."""

from __future__ import annotations

import numpy as np
import pytest

from diffseg_nnunet.evaluation.metrics import StructureScores, score_structure
from diffseg_nnunet.evaluation.protocols import PLAIN, Protocol, find_protocol
from diffseg_nnunet.evaluation.scoring import score_label_maps
from diffseg_nnunet.evaluation.structures import Structure

SPACING_MM = (2.0, 1.0, 1.0)


def scores_of(
    reference: np.ndarray,
    prediction: np.ndarray,
    structures: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    protocol: Protocol = PLAIN,
    ignore: int | None = None,
) -> dict[str, StructureScores]:
    wanted = [Structure(name, *values, 1.0) for name, values in structures.items()]
    scored = score_label_maps(reference, prediction, wanted, SPACING_MM, protocol, ignore)
    assert list(scored) == list(structures)
    return {name: of_structure.scores for name, of_structure in scored.items()}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64])
def test_label_maps_score_as_their_masks_do(dtype: type) -> None:
    generator = np.random.default_rng(0)
    reference, prediction = generator.integers(0, 5, (2, 6, 7, 8)).astype(dtype)
    structures = {"one": ((1,), (1,)), "region": ((2, 4), (2, 4)), "renamed": ((1,), (3, 4)), "absent": ((9,), (9,))}
    for name, scores in scores_of(reference, prediction, structures).items():
        masks = [
            np.isin(labels, values) for labels, values in zip((reference, prediction), structures[name], strict=True)
        ]
        assert scores == score_structure(*masks, SPACING_MM, 1.0)


def test_ignored_voxels_count_for_neither_side() -> None:
    reference, prediction = np.ones((4, 4, 4), dtype=np.uint8), np.ones((4, 4, 4), dtype=np.uint8)
    prediction[0], reference[0] = 0, 7
    prediction[0, 0, 0] = 1
    scores = scores_of(reference, prediction, {"organ": ((1,), (1,))}, ignore=7)["organ"]
    assert (scores.dsc, scores.hd95_mm, scores.prediction_ml) == (1.0, 0.0, pytest.approx(0.096))


@pytest.mark.parametrize("name", ["plain", "flare22", "btcv"])
def test_what_may_not_have_been_annotated_is_not_perfect(name: str) -> None:
    """A case of which the liver alone was annotated: the background may be anything."""
    reference, prediction = np.full((6, 6, 6), 7, dtype=np.uint8), np.zeros((6, 6, 6), dtype=np.uint8)
    reference[:3] = prediction[:3] = 1
    prediction[4, :3] = 3  # in what is ignored
    prediction[1, 0, 0] = 4  # in the liver
    structures = {"liver": ((1,), (1,)), "aorta": ((2,), (2,)), "spleen": ((3,), (3,)), "pancreas": ((4,), (4,))}
    scores = scores_of(reference, prediction, structures, find_protocol(name), ignore=7)
    assert scores["liver"].dsc > 0.99
    assert scores["pancreas"].dsc == 0.0  # invented where something else was annotated
    for unknown in ("aorta", "spleen"):
        assert np.isnan([getattr(scores[unknown], name) for name in ("dsc", "nsd", "iou", "hd95_mm")]).all()
    # nothing to ignore: what is in neither is known not to be there
    whole = scores_of(np.where(reference == 7, 0, reference), prediction, structures, ignore=7)
    assert whole["aorta"].dsc == 1.0


@pytest.mark.parametrize("name", ["btcv", "synapse8"])
def test_organs_in_neither_map_are_left_out(name: str) -> None:
    reference, prediction = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    reference[0, 0, 0] = 1
    prediction[0, 0, 0] = 2
    structures = {"liver": ((1,), (1,)), "spleen": ((2,), (2,)), "gallbladder": ((3,), (3,))}
    scores = scores_of(reference, prediction, structures, find_protocol(name))
    assert scores["liver"].dsc == scores["spleen"].dsc == 0.0  # missed, invented
    assert np.isnan([scores["liver"].hd95_mm, scores["spleen"].hd95_mm]).all()
    absent = scores["gallbladder"]
    assert np.isnan([absent.dsc, absent.nsd, absent.iou, absent.hd95_mm, absent.assd_mm]).all()
    assert scores_of(reference, prediction, structures)["gallbladder"].dsc == 1.0


def test_maps_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        scores_of(np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), {"a": ((1,), (1,))})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_moving_a_square_within_a_single_slice_moves_its_contour(axis: int) -> None:
    """Not the pixels within it, each of which is surface above and below for who takes the slice for a volume."""
    reference, prediction = np.zeros((2, 60, 60), np.uint8)
    reference[10:40, 10:40] = prediction[10:40, 14:44] = 1
    maps = [np.expand_dims(each, axis) for each in (reference, prediction)]
    structure = Structure("organ", (1,), (1,), 1.0)
    scored = score_label_maps(*maps, [structure], (1.0, 1.0, 1.0))["organ"].scores
    assert scored.hd95_mm == 4.0
    assert scored.nsd < 0.6
    volume = [np.repeat(each, 30, axis) for each in maps]
    solid = score_label_maps(*volume, [structure], (1.0, 1.0, 1.0))["organ"].scores
    assert solid.hd95_mm == 4.0
    official = find_protocol("flare22")
    assert score_label_maps(*maps, [structure], (1.0, 1.0, 1.0), official)["organ"].scores.hd95_mm < 4.0
