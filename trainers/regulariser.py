"""The coordinate head kept on beside nnU-Net's loss, so that what is fine-tuned goes on telling place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from diffseg_nnunet.coordinates.head import CoordinateSettings, head_on
from diffseg_nnunet.coordinates.loss import relative_position_loss
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN


@dataclass(frozen=True)
class Points:
    """Voxels whose places are known.

    Attributes:
        voxels: int64 (B, N, axes), of this process's patches.
        shape: of the patches.
        positions: float64 (all B, N, 3), mm; of the patches of all processes, as are:
        inside: bool (all B, N).
        scans: of each patch the number of its scan.
    """

    voxels: Tensor
    shape: tuple[int, ...]
    positions: Tensor
    inside: Tensor
    scans: list[int]


class CoordinateRegulariser:
    """Adds a weighted relative-position loss to nnU-Net's, on the patches it is computed on.

    The head lies outside the network, which stays a stock one. Pairs of voxels are those of a patch, and of two patches
    where two of a batch show the same scan.

    Args:
        network: the planned one, before it is run for the first time.
        settings: of the planned coordinates; the head is that of mode "auxiliary" whatever their mode.
        weight: of the loss.
        device: where the head goes.

    Attributes:
        terms: of the last training step, detached scalars: "loss", nnU-Net's own, and "coordinates", not weighted.
    """

    def __init__(self, network: nn.Module, settings: CoordinateSettings, weight: float, device: torch.device):
        head, self._tap = head_on(network, statistics=settings.patch_statistics)
        self.head = head.to(device)
        self.terms: dict[str, Tensor] = {}
        self._weight, self._device = weight, device
        self._shared: nn.Module = self.head
        self._points: Points | None = None

    def take(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Go on with the averaged head of a pretraining.

        Returns:
            None; or, where the head keeps its random weights, why.
        """
        try:
            objective = checkpoint["settings"]["coordinates"]["objective"]
            average = checkpoint["phases"]["denoiser"]["denoiser_ema_state"]["average"]["coordinate_head"]
        except (KeyError, TypeError):
            return "the checkpoint has none"
        if objective != "relative":
            return (
                f"the checkpoint's was trained by the objective '{objective}', which leaves open where its axes point"
            )
        own = self.head.state_dict()
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in average.items()}:
            return "the checkpoint's reads other features than this network has"
        self.head.load_state_dict(average)
        return None

    def share(self) -> None:
        """Learn together with other processes."""
        self._shared = DistributedDataParallel(
            self.head, device_ids=[self._device.index] if self._device.type == "cuda" else None
        )

    def close(self) -> None:
        """Leave the network alone: nothing is trained any more."""
        self._tap.close()

    @contextmanager
    def asked(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within the block the loss is of a batch of :class:`~.located.LocatedLoader`, and the regulariser adds to it.
        Elsewhere, as in validation, it does not."""
        shape = tuple(batch["data"].shape[2:])
        everyone = processes.gathered((batch["positions"], batch["inside"], batch["scan"]))
        positions, inside, scans = (torch.cat(each) for each in zip(*everyone, strict=True))
        voxels = batch["voxels"][..., -len(shape) :].to(self._device, non_blocking=True)
        self._points = Points(voxels, shape, positions.to(self._device), inside.to(self._device), scans.tolist())
        try:
            yield
        finally:
            self._points = None

    def added_to(self, loss: Tensor) -> Tensor:
        """nnU-Net's loss of the batch the network has just read, and the weighted coordinate loss."""
        features, points = self._tap.take(), self._points
        if points is None:
            return loss
        predicted = self._shared(features, points.voxels, points.shape)
        if distributed.is_available() and distributed.is_initialized():
            # a scan's patches may lie in several processes; each computes the loss of all, as nnU-Net does its Dice
            predicted = AllGatherGrad.apply(predicted).flatten(0, 1)
        coordinates = paired_loss(predicted, points.positions, points.inside, points.scans)
        self.terms = {"loss": loss.detach(), "coordinates": coordinates.detach()}
        return loss + self._weight * coordinates


class RegularisedLoss(nn.Module):
    """A loss to which a regulariser adds."""

    def __init__(self, loss: nn.Module, regulariser: CoordinateRegulariser):
        super().__init__()
        self.loss, self.regulariser = loss, regulariser

    def forward(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        return self.regulariser.added_to(self.loss(output, target))


def paired_loss(predicted: Tensor, positions: Tensor, inside: Tensor, scans: Sequence[int]) -> Tensor:
    """Mean over patches of the relative-position loss, of pairs of patches where two show the same scan: a scalar.

    Args:
        predicted: (B, N, 3), in units of 300 mm.
        positions: float64 (B, N, 3), mm.
        inside: bool (B, N); points outside do not count.
        scans: of each patch the number of its scan.
    """
    total = predicted.new_zeros(())
    for groups in grouped(scans):
        if not groups:
            continue
        index = torch.tensor(groups, device=predicted.device)
        said, true, weight = (values[index].flatten(1, 2) for values in (predicted, positions, inside.float()))
        true = true - true[:, :1]  # float32 differences of large positions would lose decimals
        total = total + len(groups[0]) * relative_position_loss(said, true, weight).sum()
    return total / len(scans)


def grouped(scans: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Indices of patches two by two of the same scan, in their order, as the pretraining has them; and those of the
    patches left over.

    Not all of a scan together: the pairs of voxels would grow with the square of a batch of slices.
    """
    pairs: list[list[int]] = []
    waiting: dict[int, list[int]] = {}
    for index, scan in enumerate(scans):
        group = waiting.setdefault(scan, [])
        group.append(index)
        if len(group) == PATCHES_PER_SCAN:
            pairs.append(waiting.pop(scan))
    return pairs, list(waiting.values())
