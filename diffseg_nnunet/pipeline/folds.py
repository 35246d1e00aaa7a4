"""Which folds of a data set there are models of."""

from __future__ import annotations

from collections.abc import Sequence

from diffseg_nnunet.pipeline.label_budgets import budget_folds
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import training_stage
from diffseg_nnunet.pipeline.starting import FINAL, Fold


def trained_folds(project: Project, trainer: str, configurations: Sequence[str]) -> tuple[Fold, ...]:
    """The folds that are trained, of all configurations, which belong together: without those of label budgets, which
    are trained on a part of the labels, and without "all", unless there is nothing else.

    Args:
        trainer: its registered name.
    """
    folders = [project.model_folder(trainer, configuration) for configuration in configurations]
    names = set.intersection(
        *({path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{FINAL}")} for folder in folders)
    )
    numbers = sorted(int(name) for name in names if name.isdecimal())
    budgets = budget_folds(project)

    def of_part(fold: int) -> bool:
        """Also where the folds were drawn anew since, and the budget is forgotten but for its network."""
        stages = (training_stage(trainer, configuration, fold) for configuration in configurations)
        return fold in budgets or any(project.manifest.stage(name).get("settings", {}).get("labels") for name in stages)

    return tuple(fold for fold in numbers if not of_part(fold)) or (("all",) if "all" in names else ())
