"""Plans whose networks can start from a checkpoint: with its spacing, normalisation and topology where data allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.adoption import (
    SPACING_FACTOR,
    Normalisation,
    Source,
    adopt_normalisation,
    adopt_spacing,
    adopt_topology,
)
from diffseg_nnunet.planning.section import STANDARD_CONFIGURATIONS
from diffseg_nnunet.training.adaptation import Adaptation, adapt, require_share

_SAME_SPACING = 1e-3  # relative
_DIGITS = 6


class AdoptingPlanning:
    """Takes over what ``options.source`` has and the data allow; without a source, all is the next planner's.

    A mix-in placed before the planner. A 3D source sets the spacing of 3d_fullres, a 2D source that of the slices;
    every configuration of as many axes gets a topology that the source's weights fit.
    """

    def determine_fullres_target_spacing(self) -> np.ndarray:
        own = super().determine_fullres_target_spacing()
        source: Source | None = self.options.source
        if source is None or self.overwrite_target_spacing is not None:
            return own
        adopted = np.array(own, dtype=float)
        if source.dimensions == 3:
            return np.array(adopt_spacing(own, source.spacing_of_array()))
        axes = _slices_first(own)[1:]
        adopted[axes] = adopt_spacing(adopted[axes], source.spacing)
        return adopted

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        source: Source | None = self.options.source
        if source is None or self.suppress_transpose:
            return super().determine_transpose()
        if source.dimensions == 2:  # slices are stacked as without the source, whatever its spacing does to them
            forward = _slices_first(super().determine_fullres_target_spacing())
        elif np.allclose(self.determine_fullres_target_spacing(), source.spacing_of_array(), rtol=_SAME_SPACING):
            forward = list(source.transpose_forward)
        else:
            return super().determine_transpose()
        return forward, [forward.index(axis) for axis in range(3)]

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        adopted = self._normalisation()[0]
        return list(adopted.schemes), list(adopted.masks)

    def adapted(
        self, architecture: Mapping[str, Any], spacing: Sequence[float], patch: Sequence[int]
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The architecture to plan with for a patch at a spacing, and the patch padded to what its pooling divides.

        Args:
            architecture: nnU-Net's for this patch.
            spacing: mm, 2 or 3 axes in the order of the network.
            patch: size of as many axes.

        Returns:
            Both unchanged without a source, or where it has another number of axes; applied again, the same.
        """
        source: Source | None = self.options.source
        if source is None or source.dimensions != len(patch):
            return dict(architecture), tuple(int(size) for size in patch)
        same = np.allclose(spacing, source.spacing, rtol=_SAME_SPACING)
        return adopt_topology(architecture, source.architecture, same, patch)

    def save_plans(self, plans: dict[str, Any]) -> None:
        plans["foreground_intensity_properties_per_channel"] = dict(self._normalisation()[0].intensities)
        super().save_plans(plans)

    def _section(self, plans: dict[str, Any]) -> dict[str, Any]:
        section = super()._section(plans)
        return section if self.options.source is None else {**section, "source": self._source_section(plans)}

    def _normalisation(self) -> tuple[Normalisation, list[int]]:
        schemes, masks = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        intensities = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        own = Normalisation(tuple(schemes), tuple(masks), intensities)
        source: Source | None = self.options.source
        return (own, []) if source is None else adopt_normalisation(own, source.normalisation)

    def _source_section(self, plans: dict[str, Any]) -> dict[str, Any]:
        """Where the plan's networks start, and what share of them does.

        Raises:
            BadInputError: no configuration has as many axes as the source, or too small a share of one fits it.
        """
        source: Source = self.options.source
        manager = PlansManager(plans)
        adaptations = {
            name: self._adaptation(manager, name)
            for name in manager.available_configurations
            if name in STANDARD_CONFIGURATIONS
            and (configuration := manager.get_configuration(name)).previous_stage_name is None
            and len(configuration.patch_size) == source.dimensions
        }
        if not adaptations:
            raise BadInputError(
                f"{source.name} is of a {source.dimensions}D network; the data set has only the configuration(s) "
                f"{', '.join(manager.available_configurations)}.",
                "Give a checkpoint of as many dimensions, or plan without --from-checkpoint.",
            )
        for name, adaptation in adaptations.items():
            require_share(adaptation, source.name, name)
        return {
            "checkpoint": source.name,
            "sha256": source.sha256,
            "configuration": source.configuration,
            "adopted": self._adopted(manager, adaptations),
            "shares": {name: _rounded(adaptation.shares()) for name, adaptation in adaptations.items()},
            "used": {name: round(adaptation.used, _DIGITS) for name, adaptation in adaptations.items()},
            "transfer": {
                name: [{**row, "share": round(row["share"], _DIGITS)} for row in adaptation.rows()]
                for name, adaptation in adaptations.items()
            },
        }

    def _adaptation(self, manager: PlansManager, name: str) -> Adaptation:
        configuration = manager.get_configuration(name)
        with torch.device("meta"):  # names and shapes are all that is asked for
            network = get_network_from_plans(
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
                len(self.dataset_json["channel_names"]),
                1,
                allow_init=False,
            )
        return adapt(network.state_dict(), self.options.source.weights)

    def _adopted(self, manager: PlansManager, names: Mapping[str, Any]) -> list[str]:
        """What was taken over and what was not, in sentences."""
        source: Source = self.options.source
        channels = self._normalisation()[1]
        count = len(self.dataset_json["channel_names"])
        said = [
            "normalisation: of all channels"
            if len(channels) == count
            else f"normalisation: of {len(channels)} of {count} channels; the others' intensities mean something else"
        ]
        for name in names:
            configuration = manager.get_configuration(name)
            pairs = list(zip(configuration.spacing, source.spacing, strict=True))
            equal = [bool(np.isclose(ours, theirs, rtol=_SAME_SPACING)) for ours, theirs in pairs]
            theirs = source.architecture["arch_kwargs"]
            ours = configuration.network_arch_init_kwargs
            mm = " × ".join(f"{each:g}" for each in source.spacing)
            if all(equal):
                said.append(f"{name}, spacing: {mm} mm")
            else:
                own = " × ".join(f"{each:g}" for each in configuration.spacing)
                said.append(
                    f"{name}, spacing: {own} mm, the checkpoint's {mm} mm on {sum(equal)} of {len(equal)} axes; on the "
                    f"others it is more than a factor of {SPACING_FACTOR:g} from the data's, or another was chosen"
                )
            said.append(
                f"{name}, topology: {ours['n_stages']} of the checkpoint's {theirs['n_stages']} stages, with its "
                f"features and blocks, {'its' if all(equal) else 'own'} kernels and strides where the patch allows"
            )
        return said


def _slices_first(spacing: Sequence[float]) -> list[int]:
    """nnU-Net's order of the axes: the coarsest first."""
    first = int(np.argmax(spacing))
    return [first, *(axis for axis in range(3) if axis != first)]


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {kind: round(share, _DIGITS) for kind, share in shares.items()}
