"""What ``diffseg run`` is asked for, on top of what the data set's last run was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.pipeline.starting import Fold

NO_CHECKPOINT, ALL_LABELS = Path("none"), "all"
"""In place of what the last run had."""


@dataclass(frozen=True)
class RunRequest:
    """What to run. What is None, or missing in a mapping, is as in the data set's last run, else the default.

    Attributes:
        configurations: default: 3d_fullres, or 2d where the data are.
        folds: trained one after the other; default: 0.
        labels: budget that each fold's labels are cut down to; None: all, and ALL_LABELS in place of the last run's.
        label_seed: of the budget's draw (default: 0).
        strategy: "finetune" (default), or another of `diffseg train`.
        pretrained: checkpoint that all folds start from; None, or NO_CHECKPOINT in place of the last run's: the one the
            plan was made to start from, if it was, else they are pretrained.
        pretrain_on: "fold" (default; each fold's own training cases: validation cases stay unseen) or "all" (once, all
            cases).
        refine: train a refiner on each fold, and use it for the structures it improves (default: no).
        plan: fields of PlanRequest that were given.
        pretraining, training, refining: fields of the stages' settings that were given.
        workers: augmentation processes of every training; None: by the cores there are. Not kept: another machine may
            go on.
        device: "auto", "cpu" or "cuda".
        predict_test: segment imagesTs with the result.
    """

    configurations: tuple[str, ...] | None = None
    folds: tuple[Fold, ...] | None = None
    labels: str | None = None
    label_seed: int | None = None
    strategy: str | None = None
    pretrained: Path | None = None
    pretrain_on: str | None = None
    refine: bool | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    refining: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    device: str = "auto"
    predict_test: bool = True

    def on_top_of(self, last: Mapping[str, Any]) -> RunRequest:
        """This request with the gaps filled from the options of the last run, as :meth:`kept` stored them."""
        labels = self.labels or last.get("labels") or ALL_LABELS
        kept_seed = 0 if labels == ALL_LABELS else last.get("label_seed") or 0
        return replace(
            self,
            configurations=self.configurations or tuple(last.get("configurations") or ()) or None,
            folds=self.folds or tuple(last.get("folds") or (0,)),
            labels=None if labels == ALL_LABELS else labels,
            label_seed=kept_seed if self.label_seed is None else self.label_seed,
            strategy=self.strategy or last.get("strategy") or "finetune",
            pretrained=self._starting_point(last),
            pretrain_on=self.pretrain_on or last.get("pretrain_on") or "fold",
            refine=last.get("refine", False) if self.refine is None else self.refine,
            pretraining={**last.get("pretraining", {}), **self.pretraining},
            training=self._training(last),
            refining={**last.get("refining", {}), **self.refining},
        )

    def _training(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """The last run's settings with what was given on top; a rate is that of one strategy and optimizer."""
        kept = dict(last.get("training", {}))
        of_rate = (self.strategy or last.get("strategy"), self.training.get("optimizer", kept.get("optimizer")))
        if of_rate != (last.get("strategy"), kept.get("optimizer")):
            kept.pop("initial_lr", None)
        return {**kept, **self.training}

    def _starting_point(self, last: Mapping[str, Any]) -> Path | None:
        """The checkpoint that was given, else the last run's, where the strategy starts from one."""
        chosen = self.pretrained or Path(last.get("pretrained") or NO_CHECKPOINT)
        twin = self.pretrained is None and (self.strategy or last.get("strategy")) == "scratch"
        return None if twin or chosen == NO_CHECKPOINT else chosen

    def kept(self) -> dict[str, Any]:
        """What the next run may fall back on; the plan's options are kept with the plan."""
        return {
            "configurations": list(self.configurations or ()),
            "folds": list(self.folds or ()),
            "labels": self.labels,
            "label_seed": self.label_seed,
            "strategy": self.strategy,
            "pretrained": None if self.pretrained is None else str(self.pretrained),
            "pretrain_on": self.pretrain_on,
            "pretraining": dict(self.pretraining),
            "refine": self.refine,
            "training": dict(self.training),
            "refining": dict(self.refining),
        }
