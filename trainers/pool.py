"""The cases a network is pretrained on: preprocessed cases of several folders behind nnU-Net's data-set interface."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.section import UNLABELLED_SUFFIX
from diffseg_nnunet.preprocessed import preprocessed_cases
from diffseg_nnunet.training.settings import Pool
from diffseg_nnunet.verification.findings import listed


@dataclass(frozen=True)
class PoolMember:
    """Some cases of one preprocessed folder.

    Attributes:
        source: the data set's name, for the record and to keep equal case ids of two data sets apart.
        folder: preprocessed by the plan at hand.
        cases: identifiers within the folder.
    """

    source: str
    folder: Path
    cases: tuple[str, ...]

    def without(self, identifiers: Collection[str]) -> PoolMember:
        """The same but for some of ``source/case``."""
        return replace(self, cases=tuple(case for case in self.cases if f"{self.source}/{case}" not in identifiers))


class PooledDataset:
    """The union of the members; identifiers are ``source/case``. Quacks like nnU-Net's data sets for the loader.

    Raises:
        BadInputError: the pool is empty; two members have a case of the same identifier.
    """

    def __init__(self, members: Sequence[PoolMember]):
        self._datasets: dict[str, nnUNetBaseDataset] = {}
        self._locations: dict[str, tuple[nnUNetBaseDataset, str]] = {}
        for member in members:
            if not member.cases:
                continue
            dataset = infer_dataset_class(str(member.folder))(str(member.folder), list(member.cases))
            located = {f"{member.source}/{case}": (dataset, case) for case in member.cases}
            if twice := sorted(located.keys() & self._locations.keys()):
                raise BadInputError(
                    f"The pool to pretrain on holds two cases of the same id: {listed(twice)}.",
                    "Take out of imagesUn what imagesTr has too (rename it, if it is another scan), and run "
                    "`diffseg preprocess` again.",
                )
            self._locations |= located
        self.identifiers = sorted(self._locations)
        if not self.identifiers:
            raise BadInputError(
                "The pool to pretrain on is empty.",
                "Run `diffseg preprocess` first; add scans with `diffseg plan ID --unlabeled ID2` or in imagesUn/.",
            )

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        dataset, case = self._locations[identifier]
        return dataset.load_case(case)

    def described(self, identifier: str) -> tuple[dict[str, Any], tuple[int, ...]]:
        """What preprocessing recorded of a case, and the spatial shape of its preprocessed array; reads no voxels.

        The record is nnU-Net's own pickle, written by this workspace's preprocessing.
        """
        data, _, _, properties = self.load_case(identifier)
        return properties, tuple(data.shape[1:])

    def probabilities(self, balance: float) -> np.ndarray:
        """How often each of :attr:`identifiers` is drawn: float64 (cases,), of sum 1.

        Args:
            balance: a data set of n cases is drawn in proportion to n^(1 − balance): 0, every case alike; 1, every data
                set alike; 0.5, MultiTalent's compromise (arXiv 2303.14444).
        """
        sources = np.array([identifier.split("/", 1)[0] for identifier in self.identifiers])
        counts = {source: np.count_nonzero(sources == source) for source in set(sources)}
        weight = np.array([counts[source] ** -balance for source in sources], dtype=float)
        return weight / weight.sum()

    def one_of_each_source(self) -> list[str]:
        """The first identifier of each data set."""
        return list({identifier.split("/", 1)[0]: identifier for identifier in reversed(self.identifiers)}.values())

    def record(self) -> Mapping[str, list[str]]:
        """source -> case ids, for checkpoints and manifests."""
        record: dict[str, list[str]] = {}
        for identifier in self.identifiers:
            source, case = identifier.split("/", 1)
            record.setdefault(source, []).append(case)
        return record


def united(*records: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What :meth:`PooledDataset.record` gives, of all that is in any of the records."""
    sources = sorted(set().union(*records))
    return {source: sorted(set().union(*(record.get(source, ()) for record in records))) for source in sources}


def unlabelled_members(preprocessed: Path, data_identifier: str) -> list[PoolMember]:
    """The cases without labels that a data set is preprocessed with, one member for each data set they come from.

    Args:
        preprocessed: the data set's folder in nnUNet_preprocessed.
        data_identifier: of the configuration.
    """
    root = preprocessed / (data_identifier + UNLABELLED_SUFFIX)
    sources = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    members = [PoolMember(path.name, path, preprocessed_cases(path)) for path in sources]
    return [member for member in members if member.cases]


def pools_of_fold(
    preprocessed: Path,
    data_identifier: str,
    pool: Pool,
    fold: int | str,
    training: Sequence[str],
    validation: Sequence[str],
    held_back: Collection[str] = (),
) -> tuple[PooledDataset, PooledDataset]:
    """The cases to learn from and those to watch the loss on; without labels both are the same.

    Args:
        preprocessed: the data set's folder in nnUNet_preprocessed, of its name.
        data_identifier: of the configuration.
        pool: the setting.
        fold: or "all".
        training, validation: the fold's labelled cases.
        held_back: ``source/case`` of unlabelled scans that are not learnt from, unless the pool or the fold is "all".

    Raises:
        BadInputError: there is nothing to learn from; a validation case of the fold would be learnt from, unless the
            pool or the fold is "all".
    """
    name, own = preprocessed.name, preprocessed / data_identifier
    unlabelled, labelled = unlabelled_members(preprocessed, data_identifier), preprocessed_cases(own)
    if not labelled:
        seen = PooledDataset(unlabelled)
        return seen, seen
    if "all" not in (pool, fold):
        unlabelled = [member.without(held_back) for member in unlabelled]
    cases = {"unlabeled": (), "training": tuple(training), "all": labelled}[pool]
    seen = PooledDataset([PoolMember(name, own, cases), *unlabelled])
    watched = PooledDataset([PoolMember(name, own, tuple(validation))])
    if "all" not in (pool, fold):
        _refuse_leakage(seen, watched, fold)
    return seen, watched


def _refuse_leakage(seen: PooledDataset, watched: PooledDataset, fold: int | str) -> None:
    if leaked := sorted(set(seen.identifiers) & set(watched.identifiers)):
        raise BadInputError(
            f"{len(leaked)} validation case(s) of fold {fold} would be pretrained on: {listed(leaked)}.",
            "Take them out of the fold's training cases in splits_final.json, or their copies out of imagesUn and run "
            "`diffseg preprocess` again; or pretrain on all cases on purpose with `--pool all`.",
        )
