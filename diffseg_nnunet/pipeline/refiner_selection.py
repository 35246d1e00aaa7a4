"""Which structures the refiner improves, by the validation cases of the folds: where it does not, it is not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, mean_with_interval
from diffseg_nnunet.pipeline.evaluating import evaluate_validation
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.training.checkpoint import file_digest


@dataclass(frozen=True)
class Comparison:
    """DSC of one structure with and without the refiner, over the validation cases of all folds.

    Attributes:
        structure: its name, or that of the mean over structures.
        before, after: means over cases.
        gain: mean of the paired differences.
        gain_low, gain_high: its 95 % interval (bootstrap over cases); None with fewer than two cases.
        cases: how many.
    """

    structure: str
    before: float
    after: float
    gain: float
    gain_low: float | None
    gain_high: float | None
    cases: int

    @property
    def helps(self) -> bool:
        """Whether the whole interval of the gain is above 0: with few cases a mean alone is above it by chance."""
        return self.gain_low is not None and self.gain_low > 0

    def __str__(self) -> str:
        interval = "" if self.gain_low is None else f" [{self.gain_low:+.4f}, {self.gain_high:+.4f}]"
        kept = "refined" if self.helps else "left as it is"
        return f"{self.structure}: DSC {self.before:.4f}, refined {self.after:.4f}, {self.gain:+.4f}{interval}: {kept}"


@dataclass(frozen=True)
class RefinerSelection:
    """What of a configuration is refined.

    Attributes:
        structures: those that the refiner is used for; of regions, which overlap, all or none.
        comparisons: one a structure, and that of the mean over structures last.
    """

    structures: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is left as it is."""
        return len(self.structures) == len(self.comparisons) - 1


def compare(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> tuple[Comparison, ...]:
    """Compare two series of evaluations of the same cases, one a fold; cases that either could not score are left out.

    One comparison a structure, in the order of the reports, and last that of each case's mean over structures.
    """

    def scores(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for evaluation in evaluations:
            for row in evaluation.rows:
                found.setdefault(row.structure, {})[row.case] = row.dsc
            for mean in evaluation.case_means:
                found.setdefault(ALL_STRUCTURES, {})[mean.case] = mean.dsc
        return found

    plain, refined = scores(before), scores(after)
    names = [name for name in plain if name != ALL_STRUCTURES and name in refined]
    return tuple(_comparison(name, plain[name], refined[name]) for name in (*names, ALL_STRUCTURES))


def _comparison(structure: str, before: dict[str, float], after: dict[str, float]) -> Comparison:
    cases = sorted(before.keys() & after.keys())
    one, other = (np.array([scores[case] for case in cases], float) for scores in (before, after))
    gain = mean_with_interval(other - one)
    return Comparison(
        structure, float(np.nanmean(one)), float(np.nanmean(other)), gain.mean, gain.ci_low, gain.ci_high, gain.n
    )


def chosen(comparisons: Sequence[Comparison], overlapping: bool) -> tuple[str, ...]:
    """The structures that are refined.

    Args:
        overlapping: whether they are regions: then all, if the mean over structures gains, else none.
    """
    *structures, overall = comparisons
    if overlapping:
        return tuple(each.structure for each in structures) if overall.helps else ()
    return tuple(each.structure for each in structures if each.helps)


def select_refiner(project: Project, configuration: str, folds: Sequence[Fold], strategy: str) -> RefinerSelection:
    """Compare the refined validation cases with the segmentor's, and say what is kept."""
    digests = {
        f"{name}/fold_{fold}": file_digest(project.model_folder(name, configuration) / f"fold_{fold}" / FINAL)
        for name in (strategy, REFINE)
        for fold in folds
    }
    inputs = {"checkpoints": digests, "content": project.raw().content_signature()}
    stage = f"select/{REFINE}/{strategy}/{configuration}"
    if not project.manifest.is_finished(stage, inputs):
        before, after = (
            [evaluate_validation(project, name, configuration, fold) for fold in folds] for name in (strategy, REFINE)
        )
        with project.manifest.running(stage, inputs, {"folds": list(folds)}) as run:
            comparisons = compare(before, after)
            overlapping = "regions_class_order" in project.dataset_json()
            run.outputs["structures"] = list(chosen(comparisons, overlapping))
            run.outputs["comparisons"] = [asdict(each) for each in comparisons]
    outputs = project.manifest.stage(stage)["outputs"]
    selection = RefinerSelection(
        tuple(outputs["structures"]), tuple(Comparison(**each) for each in outputs["comparisons"])
    )
    for comparison in selection.comparisons[:-1]:
        project.reporter.info(f"{configuration}, {comparison}")
    if not selection.structures:
        project.reporter.info(f"{configuration}: the refiner is not used, the validation cases do not speak for it")
    return selection
