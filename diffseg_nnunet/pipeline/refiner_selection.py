"""Which structures the refiner improves, by the validation cases of the folds: where it does not, it is not used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from diffseg_nnunet.evaluation.comparison import LEVEL, holm, signed_rank_test, smallest_p
from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, mean_with_interval
from diffseg_nnunet.inference.folders import SEGMENTOR_ALONE
from diffseg_nnunet.pipeline.evaluating import evaluate_validation
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refined_crossval import RefinedCrossval, refined_crossval
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.selection import folds_named
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.training.checkpoint import file_digest

_TEST = "Wilcoxon signed-rank, Holm over structures; better than its segmentor alone; postprocessed"
_DECIMALS = 9  # equal scores may differ in the last bit


@dataclass(frozen=True)
class Comparison:
    """DSC of one structure with and without the refiner, over the validation cases of all folds.

    Attributes:
        structure: its name, or that of the mean over structures.
        before, after: means over cases.
        gain: mean of the paired differences.
        gain_low, gain_high: its 95 % interval (bootstrap over cases); None with fewer than two cases.
        cases: how many.
        p: of the two-sided Wilcoxon signed-rank test, never below what the exact one can reach with as many differences
            that are not zero; None without any case.
        p_holm: corrected over the structures; p itself for the mean over structures, which is one test of its own.
        alone: mean of the segmentors that learnt in turn with their refiners, without these; None where they did not.
    """

    structure: str
    before: float
    after: float
    gain: float
    gain_low: float | None
    gain_high: float | None
    cases: int
    p: float | None
    p_holm: float | None
    alone: float | None = None

    @property
    def gains(self) -> bool:
        """Whether DSC gains beyond chance, p_holm below 0.05."""
        return self.gain > 0 and self.p_holm is not None and self.p_holm < LEVEL

    @property
    def helps(self) -> bool:
        """Whether it gains, and by the refiner: not by what its segmentor has learnt meanwhile."""
        return self.gains and (self.alone is None or self.after > self.alone)

    def __str__(self) -> str:
        interval = "" if self.gain_low is None else f" [{self.gain_low:+.4f}, {self.gain_high:+.4f}]"
        chance = "" if self.p_holm is None else f", p {self.p_holm:.2g}"
        alone = "" if self.alone is None else f", its segmentor alone {self.alone:.4f}"
        kept = "refined" if self.helps else "left as it is"
        if self.gains and not self.helps:
            kept += ", since the gain is of the segmentor's longer training"
        return (
            f"{self.structure}: DSC {self.before:.4f}, refined {self.after:.4f}, {self.gain:+.4f}{interval}{chance}"
            f"{alone}: {kept}"
        )


@dataclass(frozen=True)
class RefinerSelection:
    """What of a configuration is refined.

    Attributes:
        structures: those that the refiner is used for; of regions, which overlap, all or none.
        comparisons: one a structure, and that of the mean over structures last.
        crossval: the validation cases with these structures refined, and postprocessed; None without any.
    """

    structures: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    crossval: RefinedCrossval | None

    @property
    def complete(self) -> bool:
        """Whether nothing is left as it is."""
        return len(self.structures) == len(self.comparisons) - 1


def compare(
    before: Sequence[Evaluation], after: Sequence[Evaluation], alone: Sequence[Evaluation] | None = None
) -> tuple[Comparison, ...]:
    """Compare two series of evaluations of the same cases, one a fold; cases that either could not score are left out.

    One comparison a structure, in the order of the reports, and last that of each case's mean over structures.

    Args:
        alone: of the segmentors that learnt in turn with their refiners; None where they did not.
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
    learnt = None if alone is None else scores(alone)
    names = [name for name in plain if name != ALL_STRUCTURES and name in refined]
    *structures, overall = (
        _comparison(name, plain[name], refined[name], None if learnt is None else learnt[name])
        for name in (*names, ALL_STRUCTURES)
    )
    tested = [index for index, each in enumerate(structures) if each.p is not None]
    for index, p in zip(tested, holm([structures[index].p for index in tested]), strict=True):
        structures[index] = replace(structures[index], p_holm=float(p))
    return (*structures, replace(overall, p_holm=overall.p))


def _comparison(
    structure: str, before: dict[str, float], after: dict[str, float], alone: dict[str, float] | None
) -> Comparison:
    cases = sorted(before.keys() & after.keys() & (before if alone is None else alone).keys())
    one, other = (np.array([scores[case] for case in cases], float) for scores in (before, after))
    differences = np.round(other - one, _DECIMALS)
    gain = mean_with_interval(differences)
    defined = differences[~np.isnan(differences)]
    p = max(signed_rank_test(defined), smallest_p(np.count_nonzero(defined))) if defined.size else None
    means = (float(np.nanmean(scores)) for scores in (one, other))
    learnt = None if alone is None else float(np.nanmean([alone[case] for case in cases]))
    return Comparison(structure, *means, gain.mean, gain.ci_low, gain.ci_high, gain.n, p, None, learnt)


def cases_needed(tests: int) -> int:
    """Fewest cases with which the smallest of so many p-values can be below 0.05 after Holm's correction."""
    return next(cases for cases in itertools.count(1) if tests * smallest_p(cases) < LEVEL)


def too_few(comparisons: Sequence[Comparison], overlapping: bool) -> str | None:
    """Why nothing can be chosen, whatever the gains are; None where the cases may suffice.

    Args:
        overlapping: as of :func:`chosen`.
    """
    *structures, overall = comparisons
    tested = [overall] if overlapping else [each for each in structures if each.p is not None]
    cases, needed = max((each.cases for each in tested), default=0), cases_needed(max(1, len(tested)))
    if cases >= needed:
        return None
    what = "the mean over structures" if overlapping else f"{len(tested)} structure(s)"
    return (
        f"{cases} validation case(s) are too few to tell a gain from chance, so the refiner is not used: the test of "
        f"{what} needs {needed} at least; refine more folds"
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
    inputs = {"checkpoints": digests, "content": project.raw().content_signature(), "test": _TEST}
    stage = f"select/{REFINE}/{strategy}/{configuration}/{folds_named(folds)}"
    overlapping = "regions_class_order" in project.dataset_json()
    if not project.manifest.is_finished(stage, inputs):
        before, after = (
            [evaluate_validation(project, name, configuration, fold) for fold in folds] for name in (strategy, REFINE)
        )
        folders = [project.model_folder(REFINE, configuration) / f"fold_{fold}" for fold in folds]
        alone = None
        if all((folder / SEGMENTOR_ALONE).is_dir() for folder in folders):
            alone = [evaluate_validation(project, REFINE, configuration, fold, SEGMENTOR_ALONE) for fold in folds]
        with project.manifest.running(stage, inputs, {"folds": list(folds)}) as run:
            comparisons = compare(before, after, alone)
            structures = chosen(comparisons, overlapping)
            run.outputs["structures"] = list(structures)
            run.outputs["comparisons"] = [asdict(each) for each in comparisons]
            run.outputs["crossval"] = None
            if structures:
                partly = None if len(structures) == len(comparisons) - 1 else structures
                with project.log("select"):
                    crossval = refined_crossval(project, configuration, folds, strategy, partly)
                run.outputs["crossval"] = crossval.to_json(project.workspace.results)
    outputs = project.manifest.stage(stage)["outputs"]
    selection = RefinerSelection(
        tuple(outputs["structures"]),
        tuple(Comparison(**each) for each in outputs["comparisons"]),
        RefinedCrossval.from_json(outputs["crossval"], project.workspace.results),
    )
    for comparison in selection.comparisons[:-1]:
        project.reporter.info(f"{configuration}, {comparison}")
    if (reason := too_few(selection.comparisons, overlapping)) is not None:
        project.reporter.warn(f"{configuration}: {reason}")
    elif not selection.structures:
        project.reporter.info(f"{configuration}: the refiner is not used, the validation cases do not speak for it")
    return selection
