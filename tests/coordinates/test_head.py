"""The coordinate head, the tap it reads from, and the voxels it is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from diffseg_nnunet.coordinates.head import CoordinateHead, CoordinateSettings, FeatureTap, gather_voxels


@pytest.mark.parametrize("spatial", [(5, 7), (4, 5, 6)])
def test_gathered_features_are_those_at_the_voxels(spatial: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((3, 4, *spatial), generator=generator)
    voxels = torch.stack([torch.randint(0, n, (3, 11), generator=generator) for n in spatial], dim=-1)
    voxels[:, 0], voxels[:, 1] = 0, torch.tensor(spatial) - 1
    gathered = gather_voxels(features, voxels)
    assert gathered.shape == (3, 11, 4)
    for sample in range(3):
        for point in range(11):
            index = (sample, slice(None), *voxels[sample, point].tolist())
            assert torch.equal(gathered[sample, point], features[index])


@pytest.mark.parametrize("shape", [(10,), (2, 10), (2, 5, 10)])
def test_head_gives_three_numbers_a_point(shape: tuple[int, ...]) -> None:
    head = CoordinateHead(feature_channels=10, hidden=16)
    assert head(torch.randn(shape)).shape == (*shape[:-1], 3)


def test_head_computes_in_float32_whatever_it_is_given() -> None:
    torch.manual_seed(0)
    head, features = CoordinateHead(8), torch.randn(5, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(features.float()))


def test_tap_hands_over_the_last_features_once() -> None:
    layer = nn.Linear(2, 3)
    tap = FeatureTap(layer)
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()
    layer(torch.zeros(1, 2))
    second = layer(torch.ones(1, 2))
    assert tap.take() is second
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()


def test_settings_survive_json() -> None:
    chosen = CoordinateSettings(mode="none", weight=0.5, points_per_patch=10)
    assert CoordinateSettings(**json.loads(json.dumps(chosen.to_json()))) == chosen


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "map"}, "map is none of auxiliary, guidance, none"),
        ({"objective": "absolute"}, "absolute is none of relative, distance"),
        ({"clean_share": 1.0}, "clean_share 1.0 is not in 0..1"),
        ({"condition_dropout": -0.1}, "condition_dropout -0.1 is not in 0..1"),
        ({"regressor_share": 1.5}, "regressor_share 1.5 is not in 0..1"),
    ],
)
def test_settings_refuse_what_is_not_there(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateSettings(**wrong)
