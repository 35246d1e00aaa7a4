"""A data set on its way through the stages: its folders, its plans, its manifest."""

from __future__ import annotations

import json
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import Groups, same_patient
from diffseg_nnunet.pipeline.manifest import Manifest
from diffseg_nnunet.pipeline.reporter import Reporter, Silent
from diffseg_nnunet.planning.section import PLANS_NAME, UNLABELLED_SUFFIX, diffseg_section
from diffseg_nnunet.preprocessed import preprocessed_cases
from diffseg_nnunet.raw_dataset import DATASET_JSON, RawDataset, read_json_object
from diffseg_nnunet.workspace import Workspace


@dataclass(frozen=True)
class Project:
    """One data set in an active workspace.

    Attributes:
        workspace: activated.
        name: ``DatasetXXX_Name``.
        reporter: where news go.
    """

    workspace: Workspace
    name: str
    reporter: Reporter = field(default_factory=Silent)

    @classmethod
    def open(cls, workspace: Workspace, dataset: int | str, reporter: Reporter | None = None) -> Project:
        """Raises BadInputError if the workspace has no such data set."""
        return cls(workspace, workspace.dataset_name(dataset), reporter or Silent())

    @property
    def id(self) -> int:
        return int(self.name[len("Dataset") : len("Dataset") + 3])

    @property
    def preprocessed(self) -> Path:
        return self.workspace.preprocessed / self.name

    @property
    def results(self) -> Path:
        return self.workspace.results / self.name

    @property
    def plans_path(self) -> Path:
        return self.preprocessed / f"{PLANS_NAME}.json"

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.results)

    def raw(self) -> RawDataset:
        return RawDataset.open(self.workspace.raw / self.name)

    def same_patient(self) -> Groups:
        """Labelled and unlabelled cases of one patient each, by the raw dataset.json.

        Raises:
            BadInputError: it names them in another form.
        """
        path = self.workspace.raw / self.name / DATASET_JSON
        return same_patient(read_json_object(path)) if path.is_file() else ()

    def plans(self) -> dict[str, Any]:
        """The plans, with our section.

        Raises:
            BadInputError: there are none, or another planner's.
        """
        if not self.plans_path.is_file():
            raise BadInputError(f"{self.name} has no plans ({self.plans_path}).", f"Run `diffseg plan {self.id}`.")
        try:
            plans = json.loads(self.plans_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(
                f"{self.plans_path} is not readable: {error}.", f"Run `diffseg plan {self.id}` again."
            ) from error
        if not isinstance(plans, dict) or "configurations" not in plans:
            raise BadInputError(f"{self.plans_path} holds no plans.", f"Run `diffseg plan {self.id}` again.")
        diffseg_section(plans)
        return plans

    def dataset_json(self) -> dict[str, Any]:
        """dataset.json as it was planned with.

        Raises:
            BadInputError: the data set is not planned.
        """
        path = self.preprocessed / DATASET_JSON
        if not path.is_file():
            raise BadInputError(f"{self.name} is not planned, {path} is missing.", f"Run `diffseg plan {self.id}`.")
        return read_json_object(path)

    def configuration(self, name: str) -> Any:
        """nnU-Net's manager of a configuration of the plans.

        Raises:
            BadInputError: the plans have no such configuration.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        manager = PlansManager(self.plans())
        if name not in manager.available_configurations:
            there = ", ".join(manager.available_configurations)
            raise BadInputError(f"The plans of {self.name} have no configuration '{name}'.", f"There are: {there}.")
        return manager.get_configuration(name)

    def preprocessed_folder(self, configuration: str) -> Path:
        return self.preprocessed / self.configuration(configuration).data_identifier

    def unlabelled_folder(self, configuration: str) -> Path:
        """Where the images without labels lie, one subfolder for each data set they come from: nnU-Net would take
        them for training cases if they lay among the labelled ones."""
        folder = self.preprocessed_folder(configuration)
        return folder.with_name(folder.name + UNLABELLED_SUFFIX)

    def labelled_preprocessed(self, configuration: str) -> tuple[str, ...]:
        return preprocessed_cases(self.preprocessed_folder(configuration))

    def model_folder(self, trainer: str, configuration: str) -> Path:
        """nnU-Net's folder of a trained model; `trainer` is a registered name."""
        return self.results / f"{registry.load('trainers', trainer).__name__}__{PLANS_NAME}__{configuration}"

    @contextmanager
    def log(self, stage: str):
        """Send what nnU-Net prints to ``logs/STAGE.log`` beside the results."""
        folder = self.results / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{stage}.log", "a", encoding="utf-8", buffering=1) as stream, redirect_stdout(stream):
            yield
