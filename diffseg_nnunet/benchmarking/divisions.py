"""Which cases train and which are tested on: the protocol's split, found in the data set's cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from filelock import FileLock

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.benchmarking.protocol import BenchmarkProtocol
from diffseg_nnunet.budgets.folds import LABEL_BUDGETS, read_budget_folds, write_budget_folds
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import Splits, ensure_splits
from diffseg_nnunet.raw_dataset import SPLITS_FILE
from diffseg_nnunet.verification import listed


@dataclass(frozen=True)
class Division:
    """Training and test cases of one fold, sorted."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def of(cls, fold: Mapping[str, Iterable[str]]) -> Division:
        """Of nnU-Net's {"train": …, "val": …}."""
        return cls(tuple(sorted(fold["train"])), tuple(sorted(fold["val"])))

    def as_fold(self) -> dict[str, list[str]]:
        return {"train": list(self.train), "val": list(self.test)}


def divisions(project: Project, protocol: BenchmarkProtocol) -> tuple[Division, ...]:
    """The protocol's folds on the data set's labelled cases.

    Raises:
        BadInputError: a test case does not exist, or none or all are tested on; the published split needs cases that
            are not here; there is no such fold, or it is a label budget.
    """
    cases = [case.identifier for case in project.raw().labelled_cases()]
    if protocol.test_cases:
        return (held_out(project.name, cases, protocol.test_cases),)
    if protocol.split is None:
        found = _own_splits(project, protocol)
    else:
        found = tuple(Division.of(fold) for fold in _published(project, protocol, cases))
    chosen = range(len(found)) if protocol.folds is None else protocol.folds
    if missing := [fold for fold in chosen if not 0 <= fold < len(found)]:
        raise BadInputError(f"The split has folds 0 to {len(found) - 1}, not {missing[0]}.", "Correct --fold.")
    return tuple(found[fold] for fold in chosen)


def held_out(name: str, cases: Sequence[str], test_cases: Sequence[str]) -> Division:
    """`test_cases` to test on, all others to train on.

    Raises:
        BadInputError: some of them do not exist, or none is left to train on.
    """
    if unknown := sorted(set(test_cases) - set(cases)):
        raise BadInputError(
            f"{name} has no labelled case {listed(unknown)}.", f"Its cases are called like {min(cases, default='?')}."
        )
    division = Division(tuple(sorted(set(cases) - set(test_cases))), tuple(sorted(set(test_cases))))
    if not division.train:
        raise BadInputError(f"All {len(cases)} labelled cases of {name} are test cases.", "Leave some to train on.")
    return division


def _own_splits(project: Project, protocol: BenchmarkProtocol) -> tuple[Division, ...]:
    """The data set's own; raises BadInputError if one that is wanted is a label budget of another."""
    splits = ensure_splits(project, protocol.configuration)
    drawn = read_budget_folds(project.preprocessed, splits)
    for fold in protocol.folds or ():
        if (budget := drawn.get(fold)) is not None:
            raise BadInputError(
                f"Fold {fold} of {project.name} is itself a label budget, {budget.labels} of fold {budget.base}.",
                f"Give --fold {budget.base} --budgets {budget.labels}.",
            )
    chosen = (split for fold, split in enumerate(splits) if protocol.folds is not None or fold not in drawn)
    return tuple(Division.of(split) for split in chosen)


def _published(project: Project, protocol: BenchmarkProtocol, cases: Sequence[str]) -> Splits:
    """The folds of a split that the data set's converter knows by name."""
    from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SourceCase

    if protocol.converter is None:
        raise BadInputError(
            f"The benchmark '{protocol.name}' is of any data set, and knows no published split.",
            "Leave out --split; choose a fold with --fold, or test cases with --test-cases.",
        )
    converter = registry.load("converters", protocol.converter)()
    as_converted = ConversionPlan(
        name=project.name,
        channel_names={},
        labels={},
        cases=tuple(SourceCase(case, (), None, "training") for case in cases),
        extra=project.raw().dataset_json,
    )
    offered = {scheme.name: scheme for scheme in converter.splits(as_converted)}
    if protocol.split not in offered:
        raise BadInputError(
            f"The {len(cases)} labelled cases of {project.name} do not make the split '{protocol.split}': a published "
            "split is taken whole or not at all.",
            f"Choose --split {' or '.join(offered) or '(none fits)'}, or name test cases of your own with "
            "--test-cases; then nothing published is comparable.",
        )
    return [{part: list(members) for part, members in fold.items()} for fold in offered[protocol.split].folds]


def ensure_fold(project: Project, configuration: str, division: Division) -> int:
    """The number of the fold that is this division, added to the splits if there is none."""
    with FileLock(project.preprocessed / f"{LABEL_BUDGETS}.lock"):
        splits = ensure_splits(project, configuration)
        drawn = read_budget_folds(project.preprocessed, splits)
        own = (number for number, fold in enumerate(splits) if number not in drawn and Division.of(fold) == division)
        if (found := next(own, None)) is not None:
            return found
        if (project.preprocessed / LABEL_BUDGETS).is_file():
            # a draw that was killed may have left the record of a fold that this one would be taken for
            write_budget_folds(project.preprocessed, drawn.values())
        write_json(project.preprocessed / SPLITS_FILE, [*splits, division.as_fold()])
        return len(splits)
