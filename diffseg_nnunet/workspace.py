"""Where raw data, preprocessed data and results live, and the environment nnU-Net reads them from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet.errors import BadInputError

WORKSPACE_VARIABLE = "DIFFSEG_WORKSPACE"
DEFAULT_WORKSPACE = "diffseg_workspace"
NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

_DATASET_FOLDER = re.compile(r"Dataset(\d{3})_([^/]+)")


@dataclass(frozen=True)
class Workspace:
    """The three folders nnU-Net works in.

    Attributes:
        raw: nnU-Net raw data sets (``DatasetXXX_Name``).
        preprocessed: fingerprints, plans, preprocessed cases.
        results: checkpoints, predictions, run manifests.
    """

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def locate(cls, folder: Path | str | None = None) -> Workspace:
        """Find the workspace: `folder`, else $DIFFSEG_WORKSPACE, else ./diffseg_workspace.

        nnU-Net's own variables win where the user has exported them.
        """
        base = Path(folder or os.environ.get(WORKSPACE_VARIABLE) or DEFAULT_WORKSPACE).expanduser().resolve()
        paths = [Path(os.environ.get(variable) or base / variable).expanduser() for variable in NNUNET_VARIABLES]
        return cls(*paths)

    def overruled(self, asked: Path | None) -> str | None:
        """Where nnU-Net's variables lead elsewhere than the folder that was asked for, in words; None where they do
        not."""
        folders = zip(NNUNET_VARIABLES, (self.raw, self.preprocessed, self.results), strict=True)
        base = None if asked is None else asked.expanduser().resolve()
        led = [f"{variable}={used}" for variable, used in folders if base and used.resolve() != base / variable]
        return f"exported, and winning over --workspace {asked}: {', '.join(led)}" if led else None

    def activate(self) -> Workspace:
        """Create the folders and set nnU-Net's variables for this process and its children.

        Must run before the first import of nnunetv2, which reads the number of processes at import time.
        """
        from diffseg_nnunet.nnunet_shim import SHIM_FOLDER
        from diffseg_nnunet.planning.hardware import usable_cores

        for path in (self.raw, self.preprocessed, self.results):
            path.mkdir(parents=True, exist_ok=True)
        self.export()
        os.environ.setdefault("nnUNet_def_n_proc", str(min(8, usable_cores())))
        external = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p]
        if str(SHIM_FOLDER) not in external:
            os.environ["nnUNet_extTrainer"] = os.pathsep.join([*external, str(SHIM_FOLDER)])
        return self

    def export(self) -> None:
        """Set nnU-Net's variables for this process and its children, before the first import of nnunetv2."""
        for variable, path in zip(NNUNET_VARIABLES, (self.raw, self.preprocessed, self.results), strict=True):
            os.environ[variable] = str(path)

    def dataset_name(self, dataset: int | str) -> str:
        """The folder name ``DatasetXXX_Name`` of an id, wherever in the workspace it is found.

        Args:
            dataset: the id, also as text; or the folder name itself, as nnU-Net takes either.

        Raises:
            BadInputError: no data set has this id or name, or several have the id.
        """
        dataset_id, named = _as_id(dataset)
        names = {
            entry.name
            for root in (self.raw, self.preprocessed, self.results)
            if root.is_dir()
            for entry in root.iterdir()
            if (match := _DATASET_FOLDER.fullmatch(entry.name)) and int(match[1]) == dataset_id
        }
        if not names or (named is not None and named not in names):
            known, wanted = ", ".join(self.dataset_names()) or "none", named or f"with id {dataset_id}"
            raise BadInputError(
                f"There is no data set {wanted} in {self.raw} (there: {known}).",
                "Convert one with `diffseg convert`, or point --workspace at the right folder; nnU-Net's variables win "
                "over it where they are exported.",
            )
        if len(names) > 1:
            raise BadInputError(
                f"The id {dataset_id} is used by more than one data set: {', '.join(sorted(names))}.",
                "Rename or remove all but one.",
            )
        return names.pop()

    def dataset_names(self) -> list[str]:
        """All raw data sets, sorted by id."""
        if not self.raw.is_dir():
            return []
        return sorted(entry.name for entry in self.raw.iterdir() if _DATASET_FOLDER.fullmatch(entry.name))


def is_dataset(text: str) -> bool:
    """Whether this is how a data set is called: an id, or a folder name."""
    return text.isdecimal() or _DATASET_FOLDER.fullmatch(text) is not None


def as_id(dataset: int | str) -> int:
    """The id of a data set that is called by it, or by its folder's name; raises BadInputError if by neither."""
    return _as_id(dataset)[0]


def _as_id(dataset: int | str) -> tuple[int, str | None]:
    """The id, and the folder name if that was given."""
    if isinstance(dataset, int):
        return dataset, None
    if not is_dataset(dataset):
        raise BadInputError(f"'{dataset}' is no data set.", "Give its id, 1 to 999, or its name DatasetXXX_Name.")
    match = _DATASET_FOLDER.fullmatch(dataset)
    return (int(dataset), None) if match is None else (int(match[1]), dataset)


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """``DatasetXXX_Name`` for nnU-Net.

    Raises:
        BadInputError: the id is not within 1..999, or the name has characters other than letters, digits, ``-`` and
            single ``_`` (nnU-Net splits identifiers on a double one).
    """
    if not 1 <= dataset_id <= 999:
        raise BadInputError(f"The data set id {dataset_id} is not within 1..999.", "Choose another with --id.")
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise BadInputError(
            f"'{name}' cannot be the name of a data set.",
            "Choose one with --name: letters and digits, joined by single '-' or '_'.",
        )
    return f"Dataset{dataset_id:03d}_{name}"
