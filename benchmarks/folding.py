"""How exactly the conditioned network and the folded stock network agree.

Usage: python benchmarks/folding.py
"""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from results import table, write_section
from torch import nn

from diffseg_nnunet.diffusion.conditioning import TimeConditioning, fold

TIMESTEPS = (0, 100, 999)
SPATIAL = {2: (64, 64), 3: (32, 32, 32)}


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for name in ("plain", "residual encoder"):
        for dimensions in (2, 3):
            worst = max(_disagreement(name, dimensions, t) for t in TIMESTEPS)
            rows.append((name, f"{dimensions}D", f"{worst:.1e}"))
    write_section(
        "folding",
        "## Folding\n\nScript: `benchmarks/folding.py`. Largest difference between the network conditioned on time "
        f"step t (t = {', '.join(map(str, TIMESTEPS))}; random conditioning, of order one) and the folded "
        "stock network, as a share of the output's range, float32. Required: at most 1e-4.\n\n"
        + table(("U-Net", "", "max difference / range"), rows),
    )


@torch.no_grad()
def _disagreement(name: str, dimensions: int, t: int) -> float:
    network = _network(name, dimensions).eval()
    conditioning = TimeConditioning(network)
    for projection in conditioning.projections:
        nn.init.normal_(projection.weight, std=0.1)
        nn.init.normal_(projection.bias, std=0.3)
    stock = _network(name, dimensions).eval()
    stock.load_state_dict(fold(network, conditioning, t), strict=True)
    image = torch.randn(2, 1, *SPATIAL[dimensions])
    with conditioning.at(torch.full((2,), t)):
        conditioned = network(image)
    return ((conditioned - stock(image)).abs().max() / (conditioned.max() - conditioned.min())).item()


def _network(name: str, dimensions: int) -> nn.Module:
    features = [16, 32, 64, 128]
    common = {
        "input_channels": 1,
        "n_stages": 4,
        "features_per_stage": features,
        "conv_op": nn.Conv2d if dimensions == 2 else nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1, 2, 2, 2],
        "num_classes": 1,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    if name == "plain":
        return PlainConvUNet(**common, n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    return ResidualEncoderUNet(**common, n_blocks_per_stage=[1, 3, 4, 6], n_conv_per_stage_decoder=1)


if __name__ == "__main__":
    main()
