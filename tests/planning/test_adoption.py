"""What a plan takes over of a checkpoint's, as far as the data allow."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.planning.adoption import Normalisation, adopt_normalisation, adopt_spacing, adopt_topology

CT, Z, RESCALED, NONE = "CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization", "NoNormalization"


def architecture(strides: list[list[int]], features: int = 8, **changes: Any) -> dict[str, Any]:
    stages = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [features * 2**s for s in range(stages)],
            "kernel_sizes": [[3] * len(strides[0])] * stages,
            "strides": strides,
            "n_conv_per_stage": list(range(1, stages + 1)),
            "n_conv_per_stage_decoder": list(range(stages - 1, 0, -1)),
            **changes,
        },
        "_kw_requires_import": [],
    }


def halving(stages: int, axes: int = 3) -> list[list[int]]:
    return [[1] * axes] + [[2] * axes] * (stages - 1)


def test_spacing_within_a_factor_of_two() -> None:
    assert adopt_spacing([1.0, 1.0, 1.0], [2.0, 0.5, 1.0]) == [2.0, 0.5, 1.0]
    assert adopt_spacing([6.0, 0.7, 0.7], [1.0, 1.0, 1.0]) == [6.0, 1.0, 1.0]


def test_normalisation_of_the_same_kind() -> None:
    ours, theirs = {"mean": 5.0}, {"mean": 90.0}
    own = Normalisation((CT, Z, CT), (False, False, False), {"0": ours, "1": ours, "2": ours})
    adopted, channels = adopt_normalisation(own, Normalisation((CT,), (False,), {"0": theirs}))
    assert adopted == Normalisation((CT, Z, CT), (False, False, False), {"0": theirs, "1": ours, "2": theirs})
    assert channels == [0, 2]
    # by position where there are as many; z-scores and rescaling take anything, HU and what is ready do not
    own = Normalisation((Z, Z, NONE, CT), (False,) * 4, {})
    adopted, channels = adopt_normalisation(own, Normalisation((RESCALED, CT, Z, Z), (False, False, True, True), {}))
    assert (adopted.schemes, channels) == ((RESCALED, Z, NONE, CT), [0])
    adopted, _ = adopt_normalisation(
        Normalisation((Z, Z), (False, False), {}), Normalisation((Z,), (True,), {"0": theirs})
    )
    assert adopted == Normalisation((Z, Z), (True, True), {})


def test_topology_of_a_patch_that_allows_all() -> None:
    source = architecture(halving(5))
    assert adopt_topology(architecture(halving(4), 32), source, True, (64, 64, 64)) == (source, (64, 64, 64))


def test_topology_of_small_patches() -> None:
    """35 × 50 × 36 voxels, and few slices."""
    source = architecture(halving(6))
    adopted, patch = adopt_topology(architecture(halving(4), 32), source, True, (35, 50, 36))
    arguments = adopted["arch_kwargs"]
    assert arguments["strides"] == halving(4)
    assert patch == (40, 56, 40)
    assert arguments["features_per_stage"] == [8, 16, 32, 64]
    assert arguments["n_conv_per_stage"] == [1, 2, 3, 4]
    assert arguments["n_conv_per_stage_decoder"] == [3, 2, 1]  # the deepest are gone
    adopted, patch = adopt_topology(architecture(halving(4), 32), source, True, (10, 128, 128))
    assert adopted["arch_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 2], *[[1, 2, 2]] * 4]
    assert patch == (10, 128, 128)


def test_topology_at_another_spacing() -> None:
    """Strides and kernels are nnU-Net's own, on no more stages than the checkpoint has."""
    flat = architecture([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]], 32)
    flat["arch_kwargs"]["kernel_sizes"] = [[1, 3, 3], [1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
    adopted, patch = adopt_topology(flat, architecture(halving(4)), False, (20, 96, 96))
    arguments = adopted["arch_kwargs"]
    assert arguments["strides"] == flat["arch_kwargs"]["strides"][:4]
    assert arguments["kernel_sizes"] == [[1, 3, 3], [1, 3, 3], [1, 3, 3], [3, 3, 3]]
    assert arguments["features_per_stage"] == [8, 16, 32, 64]
    assert patch == (20, 96, 96)


def test_a_topology_of_other_axes_is_left_alone() -> None:
    own = architecture(halving(4, axes=2), 32)
    assert adopt_topology(own, architecture(halving(4)), True, (64, 64)) == (own, (64, 64))


@given(
    st.lists(st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(4, 200), min_size=3, max_size=3),
)
def test_what_holds_of_any_topology(pooling: list[list[int]], patch: list[int]) -> None:
    source = architecture([[1, 1, 1], *pooling])
    adopted, padded = adopt_topology(source, source, True, patch)
    arguments = adopted["arch_kwargs"]
    depth = arguments["n_stages"]
    assert 2 <= depth <= len(pooling) + 1
    for name in ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage"):
        assert len(arguments[name]) == depth
    assert len(arguments["n_conv_per_stage_decoder"]) == depth - 1
    factors = [math.prod(column) for column in zip(*arguments["strides"], strict=True)]
    for size, given_size, factor in zip(padded, patch, factors, strict=True):
        assert size % factor == 0
        assert given_size <= size < given_size + factor
        assert size // factor >= 4 or given_size < 8
    assert adopt_topology(source, source, True, padded) == (adopted, padded)
