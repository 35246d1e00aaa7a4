"""What ``diffseg predict`` is asked for, and the command line that asks for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet.inference.predictor import STEP_SIZE
from diffseg_nnunet.inference.refining import RefineOptions
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.starting import FINAL, Fold


@dataclass(frozen=True)
class PredictionRequest:
    """What to predict with.

    Attributes:
        configurations: one, or several to average.
        folds: averaged within a configuration.
        strategy: the trainer's registered name.
        mirroring: test-time mirroring over the axes the plan allows.
        step_size: from one window to the next, as a share of the patch, within 0..1, 0 excluded.
        postprocessing: nnU-Net's postprocessing.pkl to apply, None for none.
        probabilities: also write the classes' probabilities, ``.npz`` and ``.pkl`` as nnU-Net does.
        uncertainty: also write maps of the uncertainty: how much the voters of a pixel ensemble disagree, and of all
            else the entropy of the probabilities.
        checkpoint: file name within the folds.
        refine: how the folds' refiners are used; None: not at all.
        refined_structures: take these structures alone from the refined segmentation; None: all.
    """

    configurations: tuple[str, ...]
    folds: tuple[Fold, ...]
    strategy: str = "finetune"
    mirroring: bool = True
    step_size: float = STEP_SIZE
    postprocessing: Path | None = None
    probabilities: bool = False
    uncertainty: bool = False
    checkpoint: str = FINAL
    refine: RefineOptions | None = None
    refined_structures: tuple[str, ...] | None = None

    @property
    def trainer(self) -> str:
        """The registered name of the trainer whose models are predicted with."""
        return self.strategy if self.refine is None else REFINE

    def command(self, dataset_id: int, workspace: Path | None = None) -> str:
        """The command line that predicts so.

        Args:
            workspace: as it was given.
        """
        words = ["diffseg", "predict", "-d", dataset_id, "-i", "IMAGES", "-o", "OUTPUT", "--strategy", self.strategy]
        words += ["-c", *self.configurations, "-f", *self.folds]
        if self.checkpoint != FINAL:
            words += ["--checkpoint", self.checkpoint]
        if self.postprocessing is not None:
            words += ["--postprocessing", self.postprocessing]
        if self.refine is not None:
            words.append("--refine")
        if self.refined_structures is not None:
            words += ["--refine-structures", ",".join(self.refined_structures)]
        if workspace is not None:
            words += ["--workspace", workspace]
        return shlex.join(map(str, words))
