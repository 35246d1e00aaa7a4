"""Before and after refinement, paired: the tables of refinement.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from calibration import Calibration, rank_correlation
from results import table

from diffseg_nnunet.benchmarking.results import SHOWN_METRICS, averaged, joined
from diffseg_nnunet.evaluation.comparison import PairedScore, compare, holm, signed_rank_test
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, METRICS, Evaluation, case_means, mean_with_interval
from diffseg_nnunet.evaluation.tables import estimate_text, p_text

_SHOWN = {"dsc": ("DSC", 3), "nsd": ("NSD", 3), "hd95_mm": ("HD95 (mm)", 1)}


@dataclass(frozen=True)
class Scored:
    """One prediction of some cases.

    Attributes:
        calibrations: case -> its calibration; empty where no probabilities were kept.
    """

    evaluation: Evaluation
    calibrations: Mapping[str, Calibration]


@dataclass(frozen=True)
class Setting:
    """One row: predictions before and after refinement, one each a seed, in the same order.

    Attributes:
        refiner: in words.
        variant: the refiner's name; of a segmentor alone, another one.
        seeds: of the predictions.
    """

    labels: str
    refiner: str
    before: tuple[Scored, ...]
    after: tuple[Scored, ...]
    variant: str = ""
    seeds: tuple[int, ...] = ()

    def evaluations(self, structures: Sequence[str] | None = None) -> tuple[Evaluation, Evaluation]:
        """Before and after, averaged over the seeds of what both sides define in the same seed."""
        sides = [
            defined_on_both(*(restricted(each.evaluation, structures=structures) for each in pair))
            for pair in zip(self.before, self.after, strict=True)
        ]
        return over_seeds([before for before, _ in sides]), over_seeds([after for _, after in sides])


def against(settings: Sequence[Setting], variant: str) -> list[Setting]:
    """Each of the others with what one variant refined in the place of "before", where both have the same seeds."""
    default = {(each.labels, each.seeds): each.after for each in settings if each.variant == variant}
    return [
        replace(each, before=default[each.labels, each.seeds])
        for each in settings
        if each.variant != variant and (each.labels, each.seeds) in default
    ]


def restricted(
    evaluation: Evaluation, *, cases: Sequence[str] | None = None, structures: Sequence[str] | None = None
) -> Evaluation:
    """The scores of some cases and structures only; None: all. Summaries are left to :func:`over_seeds`."""
    own = [each for each in evaluation.structures if structures is None or each.structure in structures]
    names = {each.structure for each in own}
    rows = [row for row in evaluation.rows if row.structure in names and (cases is None or row.case in cases)]
    return replace(evaluation, rows=tuple(rows), structures=tuple(own), case_means=case_means(rows))


def defined_on_both(before: Evaluation, after: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Both without the scores that one of them does not define, such as the HD95 of a structure it misses; summaries
    are left to :func:`over_seeds`."""
    others = {(row.case, row.structure): row for row in after.rows}
    pairs = [(row, others[row.case, row.structure]) for row in before.rows if (row.case, row.structure) in others]
    sides: tuple[list, list] = ([], [])
    for pair in pairs:
        undefined = {name: math.nan for name in METRICS if any(math.isnan(getattr(row, name)) for row in pair)}
        for side, row in zip(sides, pair, strict=True):
            side.append(replace(row, **undefined))
    return tuple(
        restricted(replace(evaluation, rows=tuple(rows)))
        for evaluation, rows in zip((before, after), sides, strict=True)
    )


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Scores of each case averaged over the evaluations that have it, and their summaries."""
    cases = sorted({mean.case for evaluation in evaluations for mean in evaluation.case_means})
    having = {
        case: [each for each in evaluations if any(mean.case == case for mean in each.case_means)] for case in cases
    }
    return joined([averaged([restricted(each, cases=[case]) for each in having[case]]) for case in cases])


def score_table(settings: Sequence[Setting], structures: Sequence[str] | None = None) -> str:
    """DSC, NSD and HD95 of the mean over structures: before, after, and the paired difference with its interval and p;
    in brackets p with Holm's correction over the rows."""
    header = ["labels", "refiner", "cases"]
    for name, _ in _SHOWN.values():
        header += [f"{name} before → after", "difference", "p (Holm)"]
    rows, paired = [], []
    for setting in settings:
        before, after = setting.evaluations(structures)
        scores = {each.metric: each for each in compare(after, before).scores if each.structure == ALL_STRUCTURES}
        paired.append(scores)
        cells = [setting.labels, setting.refiner, str(len(before.case_means))]
        for metric, (_, digits) in _SHOWN.items():
            means = [getattr(each.overall, metric).mean for each in (before, after)]
            cells += [_change(means, digits), estimate_text(scores[metric].difference, digits, "+"), ""]
        rows.append(cells)
    for place, metric in enumerate(SHOWN_METRICS):
        for row, text in zip(rows, _with_holm([scores[metric] for scores in paired]), strict=True):
            row[3 + 3 * place + 2] = text
    return table(header, rows)


def structure_table(settings: Sequence[Setting], structures: Sequence[str]) -> str:
    """DSC of some structures: before → after, the difference with its interval."""
    rows = []
    for setting in settings:
        before, after = setting.evaluations(structures)
        scores = {each.structure: each for each in compare(after, before).scores if each.metric == "dsc"}
        means = {
            name: [
                summary.dsc.mean for side in (before, after) for summary in side.structures if summary.structure == name
            ]
            for name in structures
        }
        cells = (f"{_change(means[name], 3)}; {estimate_text(scores[name].difference, 3, '+')}" for name in structures)
        rows.append((setting.labels, setting.refiner, *cells))
    return table(("labels", "refiner", *(name.replace("_", " ") for name in structures)), rows)


def calibration_table(settings: Sequence[Setting]) -> str:
    """Expected calibration error, AUROC of the entropy for errors, and Spearman's of mean entropy and 1 - DSC."""
    header = ["labels", "refiner"]
    for name in ("calibration error", "AUROC of entropy for error"):
        header += [f"{name}, before → after", "difference", "p"]
    header.append("entropy and 1 - DSC (Spearman), before → after")
    rows = []
    for setting in settings:
        if not all(each.calibrations for each in (*setting.before, *setting.after)):
            continue
        cells = [setting.labels, setting.refiner]
        for of in (lambda each: each.error, lambda each: each.auroc):
            before, after = (_calibrations(side, of) for side in (setting.before, setting.after))
            differences = np.array([after[case] - before[case] for case in before])
            means = [float(np.nanmean(list(side.values()))) for side in (before, after)]
            difference = estimate_text(mean_with_interval(differences), 4, "+")
            cells += [_change(means, 4), difference, p_text(signed_rank_test(differences[~np.isnan(differences)]))]
        correlations = [
            _correlation(side, evaluation)
            for side, evaluation in zip((setting.before, setting.after), setting.evaluations(), strict=True)
        ]
        rows.append((*cells, _change(correlations, 2)))
    return table(header, rows)


def said_of_default(settings: Sequence[Setting]) -> str:
    """Which setting the training scans speak for, in words."""
    gains = {(setting.labels, setting.refiner): _dsc_gain(setting) for setting in settings}
    (labels, best), gain = max(gains.items(), key=lambda item: item[1].difference.mean)
    harmless = [refiner for (_, refiner), each in gains.items() if each.difference.mean >= 0]
    if not harmless:
        return "Every setting lowers the mean DSC of these scans: they speak against refining at all."
    return (
        f"The mean DSC of these scans speaks for **{best}** ({labels}: "
        f"{estimate_text(gain.difference, 3, '+')}); it is not lowered by: {', '.join(dict.fromkeys(harmless))}."
    )


def _dsc_gain(setting: Setting) -> PairedScore:
    before, after = setting.evaluations()
    scores = compare(after, before).scores
    return next(each for each in scores if (each.structure, each.metric) == (ALL_STRUCTURES, "dsc"))


def _change(means: Sequence[float], digits: int) -> str:
    return " → ".join(f"{mean:.{digits}f}" for mean in means)


def _with_holm(scores: Sequence[PairedScore]) -> list[str]:
    tested = [each.p for each in scores if each.p is not None]
    corrected = iter(holm(tested).tolist()) if tested else iter(())
    return [p_text(each.p) if each.p is None else f"{p_text(each.p)} ({p_text(next(corrected))})" for each in scores]


def _calibrations(side: Sequence[Scored], of: Callable[[Calibration], float]) -> dict[str, float]:
    """Case -> mean over the seeds that have it."""
    cases = sorted({case for each in side for case in each.calibrations})
    return {
        case: float(np.mean([of(each.calibrations[case]) for each in side if case in each.calibrations]))
        for case in cases
    }


def _correlation(side: Sequence[Scored], evaluation: Evaluation) -> float:
    bits = _calibrations(side, lambda each: each.mean_bits)
    dsc = {mean.case: mean.dsc for mean in evaluation.case_means}
    return rank_correlation([bits[case] for case in bits], [dsc[case] for case in bits])
