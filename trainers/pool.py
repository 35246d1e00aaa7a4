"""The cases a network is pretrained on: preprocessed cases of several folders behind nnU-Net's data-set interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset

from diffseg_nnunet.errors import BadInputError


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


class PooledDataset:
    """The union of the members; identifiers are ``source/case``. Quacks like nnU-Net's data sets for the loader.

    Raises:
        BadInputError: the pool is empty.
    """

    def __init__(self, members: Sequence[PoolMember]):
        self._datasets: dict[str, nnUNetBaseDataset] = {}
        self._locations: dict[str, tuple[nnUNetBaseDataset, Path, str]] = {}
        for member in members:
            if not member.cases:
                continue
            dataset = infer_dataset_class(str(member.folder))(str(member.folder), list(member.cases))
            for case in member.cases:
                self._locations[f"{member.source}/{case}"] = (dataset, member.folder, case)
        self.identifiers = sorted(self._locations)
        if not self.identifiers:
            raise BadInputError(
                "The pool to pretrain on is empty.",
                "Run `diffseg preprocess` first; add scans with `diffseg plan ID --unlabeled ID2` or in imagesUn/.",
            )

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        dataset, _, case = self._locations[identifier]
        return dataset.load_case(case)

    def properties(self, identifier: str) -> dict[str, Any]:
        """What preprocessing recorded of a case; nnU-Net's own pickle, written by this workspace's preprocessing."""
        _, folder, case = self._locations[identifier]
        return load_pickle(str(folder / f"{case}.pkl"))

    def shape(self, identifier: str) -> tuple[int, ...]:
        """Spatial shape of the preprocessed array; reads no voxels."""
        return tuple(self.load_case(identifier)[0].shape[1:])

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

    def record(self) -> Mapping[str, list[str]]:
        """source -> case ids, for checkpoints and manifests."""
        record: dict[str, list[str]] = {}
        for identifier in self.identifiers:
            source, case = identifier.split("/", 1)
            record.setdefault(source, []).append(case)
        return record
