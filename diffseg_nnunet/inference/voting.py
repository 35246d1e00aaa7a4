"""Networks that vote: what they say of a voxel are shares of votes, which are probabilities already."""

from __future__ import annotations

from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from diffseg_nnunet.probing.ensemble import VotingHead


class VotingPlansManager(PlansManager):
    """nnU-Net's plans of a network that votes: of its outputs no softmax is taken, which would flatten the shares."""

    def get_label_manager(self, dataset_json: dict, **of_nnunet: object) -> LabelManager:
        return super().get_label_manager(dataset_json, **{"inference_nonlin": _shares, **of_nnunet})


def plans_to_predict_with(plans: PlansManager, network: nn.Module) -> PlansManager:
    """Those that make probabilities of the network's outputs."""
    votes = any(isinstance(module, VotingHead) for module in network.modules())
    return VotingPlansManager(plans.plans) if votes else plans


def _shares(outputs: Tensor) -> Tensor:
    # nnU-Net adds windows up in half precision
    votes = outputs.clamp_min(0)
    return votes / votes.sum(0, keepdim=True)
