"""A program for torchrun: the gradient of a Dice loss of a batch that two processes share; see test_refining.py."""

from __future__ import annotations

import sys

import torch

from diffseg_nnunet.training import processes
from diffseg_nnunet.training.refining import Targets

if __name__ == "__main__":
    held = torch.load(sys.argv[1], weights_only=True)
    with processes.process_group(torch.device("cpu")):
        own = slice(processes.rank(), processes.rank() + 1)
        slope = torch.nn.Parameter(held["slope"])
        loss = Targets(4, regions=False, ignore=False).dice_loss(1.0, batch_dice=True, shared=True)
        loss(slope * held["log_odds"][own], held["clean"][own], None).backward()
        processes.average_gradients([slope])
        if processes.rank() == 0:
            torch.save(slope.grad, sys.argv[2])
