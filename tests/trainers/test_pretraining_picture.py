"""Progress pictures, of a compiled network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffseg_nnunet.trainers.pretraining_picture import draw_progress
from diffseg_nnunet.training.assembly import assemble
from diffseg_nnunet.training.settings import PretrainingSettings

CPU = torch.device("cpu")


def test_a_picture_compiles_nothing(tmp_path: Path) -> None:
    """Two patches are drawn, whatever the batch that the network was compiled for."""
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    layout = ([4, 8], nn.Conv2d, 3, [1, 2], 1, 1, 1)
    network = PlainConvUNet(1, 2, *layout, **norm, nonlin=nn.LeakyReLU, deep_supervision=False)
    counter = CompileCounter()
    assembly = assemble(network, None, PretrainingSettings(), CPU, torch.compile(network, backend=counter))
    trainer = SimpleNamespace(
        denoiser=assembly.denoiser,
        assembly=assembly,
        device=CPU,
        phases=[],
        current_epoch=1,
        _compute_dtype=lambda: None,
    )
    batch = {"data": torch.randn((3, 1, 16, 16), generator=torch.Generator().manual_seed(0)), "keys": ["a", "b", "c"]}
    draw_progress(trainer, batch, tmp_path / "pictures" / "epoch.png")
    assert (tmp_path / "pictures" / "epoch.png").is_file()
    assert counter.frame_count == 0
