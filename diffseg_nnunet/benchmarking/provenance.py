"""What networks had seen before fine-tuning: test cases are refused, and other data are not FLARE-legal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffseg_nnunet.benchmarking.divisions import Division
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import seen_in_pretraining
from diffseg_nnunet.pipeline.verifying import examined
from diffseg_nnunet.raw_dataset import read_json_object
from diffseg_nnunet.verification import CaseRecord, listed

FLARE22 = "flare22"
FLARE22_RULE = (
    'Its rules: "Participants are not allowed to use any additional data and pre-trained models" '
    "(flare22.grand-challenge.org/Rules)."
)
_CONVERSION, _PSEUDO_LABELLED = "conversion.json", "pseudo_labelled"  # as the converters write them


@dataclass(frozen=True)
class Origin:
    """Where a data set is from.

    Attributes:
        name: ``DatasetXXX_Name``.
        converter: registered name of the format it was converted from; None where that is not recorded.
        pseudo_labelled: training cases whose labels a model made.
    """

    name: str
    converter: str | None
    pseudo_labelled: tuple[str, ...] = ()

    @classmethod
    def of(cls, project: Project) -> Origin:
        """By what its conversion recorded."""
        raw = project.raw()
        record = raw.folder / _CONVERSION
        converter = read_json_object(record).get("format") if record.is_file() else None
        made = raw.dataset_json.get(_PSEUDO_LABELLED, {})
        return cls(project.name, converter, tuple(made.get("cases", ())) if isinstance(made, dict) else ())


@dataclass(frozen=True)
class Legality:
    """Whether results keep FLARE22's rule on data, and why."""

    legal: bool
    reason: str


Pool = Mapping[str, Sequence[str]]
"""Data set -> the cases of it that a pretraining saw."""


def recorded_pool(checkpoint: Mapping[str, Any]) -> Pool | None:
    """What a checkpoint's pretraining saw; None where it does not say, as one that `diffseg pretrain` did not write."""
    pool = checkpoint.get("pool")
    return {str(name): list(cases) for name, cases in pool.items()} if pool else None


def seen_together(pools: Iterable[Pool | None]) -> dict[str, set[str]] | None:
    """What several pretrainings saw; None where one of them does not say."""
    together: dict[str, set[str]] = {}
    for pool in pools:
        if pool is None:
            return None
        for name, cases in pool.items():
            together.setdefault(name, set()).update(cases)
    return together


def flare_legality(
    trained_on: Origin, seen: Mapping[str, Iterable[str]] | None, origins: Mapping[str, Origin]
) -> Legality:
    """FLARE22's rule: no data but its own, and no pretrained model that has seen others.

    Args:
        trained_on: the labelled data set.
        seen: data set -> cases that a pretraining saw, of all the pretrainings of the benchmark; None: one of them does
            not say.
        origins: by data set; one that is missing here is not known.
    """
    if trained_on.converter != FLARE22:
        return Legality(False, f"{trained_on.name} is not FLARE22's data{_known(trained_on)}.")
    if trained_on.pseudo_labelled:
        count = len(trained_on.pseudo_labelled)
        return Legality(False, f"{count} training case(s) have labels that another's model made. {FLARE22_RULE}")
    if seen is None:
        return Legality(False, f"What the pretrained checkpoint has seen is not recorded in it. {FLARE22_RULE}")
    foreign = [
        f"{name}{_known(origins.get(name))} ({len(list(cases))} case(s))"
        for name, cases in sorted(seen.items())
        if name not in origins or origins[name].converter != FLARE22
    ]
    if foreign:
        return Legality(False, f"Pretraining saw data that are not FLARE22's: {listed(foreign)}. {FLARE22_RULE}")
    if not seen:
        return Legality(True, "Trained on FLARE22's own labelled scans, and nothing that is reported was pretrained.")
    count = sum(len(list(cases)) for cases in seen.values())
    return Legality(True, f"Pretrained, without labels, on {count} of FLARE22's own scans and on nothing else.")


def _known(origin: Origin | None) -> str:
    if origin is None or origin.converter is None:
        return ", as far as is recorded"
    return f", but was converted as '{origin.converter}'"


def refuse_seen(
    checkpoint: Mapping[str, Any], dataset: str, division: Division, source: str, learnt: Iterable[str] = ()
) -> None:
    """Raises BadInputError if a pretraining saw a test case, or a training learnt its labels.

    Args:
        checkpoint: the pretrained one.
        dataset: the labelled data set.
        source: the checkpoint's name, for the message.
        learnt: cases whose labels the checkpoint was trained on.
    """
    if known := sorted(set(learnt) & set(division.test)):
        raise BadInputError(
            f"{source} was trained on the labels of {len(known)} test case(s): {listed(known)}.",
            "Give a checkpoint that has not seen them.",
        )
    seen = seen_in_pretraining(checkpoint, dataset, list(division.test))
    if seen:
        raise BadInputError(
            f"{source} was pretrained on the images of {len(seen)} test case(s): {listed(seen)}.",
            "Pretrain without them: with the pool 'training' or 'unlabeled', on the fold whose test cases they are.",
        )


def refuse_copies(
    project: Project, pool: Sequence[Project], divisions: Sequence[Division], seen: Pool | None = None
) -> None:
    """Raises BadInputError if the voxels of a test case are also those of a case that is trained or pretrained on.

    Args:
        project: the labelled data set, verified.
        pool: further data sets that are pretrained on, verified.
        seen: which of their cases were pretrained on; None: all but their test cases.
    """

    def counts(each: Project, record: CaseRecord) -> bool:
        return record.role != "test" and (seen is None or record.case in seen[each.name])

    own = examined(project).records
    others = [(f"{each.name}/", record) for each in pool for record in examined(each).records if counts(each, record)]
    unlabelled = [("", record) for record in own if record.role == "unlabelled"]
    for division in divisions:
        training = [("", record) for record in own if record.role == "training" and record.case in division.train]
        test = [record for record in own if record.role == "training" and record.case in division.test]
        seen = {record.voxels: where + record.case for where, record in (*training, *unlabelled, *others)}
        copies = [f"{record.case} is {seen[record.voxels]}" for record in test if record.voxels in seen]
        if copies:
            raise BadInputError(
                f"{len(copies)} test case(s) of {project.name} are also in what is trained or pretrained on, by their "
                f"voxels: {listed(copies)}.",
                "Remove the copies from the pool, or choose other test cases.",
            )
