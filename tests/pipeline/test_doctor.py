"""The doctor's findings on this machine, and on what is commonly wrong with others."""

from __future__ import annotations

import os
import sysconfig
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER
from diffseg_nnunet.pipeline import doctor
from diffseg_nnunet.pipeline.doctor import Check, run_checks
from diffseg_nnunet.workspace import NNUNET_VARIABLES, WORKSPACE_VARIABLE, Workspace

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(autouse=True)
def _nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*NNUNET_VARIABLES, WORKSPACE_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("nnUNet_extTrainer", "nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile"):
        monkeypatch.delenv(variable, raising=False)


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine(tmp_path: Path) -> None:
    checks = run_checks(Workspace.locate(tmp_path / "workspace"))
    names = [check.name for check in checks]
    assert {"python", "torch", "GPU", "memory", "shared memory", "disk", "workspace", "nnU-Net"} <= set(names)
    assert len(set(names)) == len(names) or torch.cuda.device_count() > 1
    assert [check for check in checks if check.status == "problem"] == []
    assert all(check.finding for check in checks)
    assert all(check.mend for check in checks if check.status != "ok")


def test_nothing_is_created(tmp_path: Path) -> None:
    run_checks(Workspace.locate(tmp_path / "workspace"))
    assert list(tmp_path.iterdir()) == []


def test_versions_are_those_of_pyproject() -> None:
    declared = [text.replace(" ", "") for text in requires("diffseg_nnunet") or []]
    nnunet = next(text for text in declared if text.startswith("nnunetv2"))
    assert f">={doctor._dotted(doctor.NNUNET_FROM)}" in nnunet
    assert f"<{doctor._dotted(doctor.NNUNET_BELOW)}" in nnunet
    assert f"torch>={doctor._dotted(doctor.TORCH_FROM)}" in declared


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.8.1", (2, 8, 1)), ("2.15.0+cu132", (2, 15, 0)), ("2.9.0rc1", (2, 9, 0)), ("x", ())]
)
def test_version_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor._numbers(text) == numbers


@needs_no_gpu
def test_no_gpu(tmp_path: Path) -> None:
    check = find(run_checks(Workspace.locate(tmp_path)), "GPU")
    assert check.status == "warning"
    assert "runs on the CPU" in check.finding


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(tmp_path: Path) -> None:
    check = find(run_checks(Workspace.locate(tmp_path)), "GPU")
    assert torch.cuda.get_device_name(0) in check.finding
    assert "GiB free" in check.finding


def test_an_exported_path_that_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    asked = tmp_path / "workspace"
    check = find(run_checks(Workspace.locate(asked), requested=asked), "nnUNet_raw")
    assert check.status == "warning"
    assert "elsewhere" in check.finding
    assert "unset nnUNet_raw" in (check.mend or "")
    monkeypatch.setenv(WORKSPACE_VARIABLE, str(asked))
    assert find(run_checks(Workspace.locate()), "nnUNet_raw") == check


def test_commands_name_the_exported_paths_that_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "workspace"
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    told = Workspace.locate(asked).overruled(asked)
    assert told == f"exported, and winning over --workspace {asked}: nnUNet_raw={tmp_path / 'elsewhere'}"
    monkeypatch.setenv("nnUNet_raw", str(asked / "nnUNet_raw"))
    assert Workspace.locate(asked).overruled(asked) is None
    assert Workspace.locate().overruled(None) is None


def test_exported_paths_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in NNUNET_VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for requested in (tmp_path, None):
        assert find(run_checks(Workspace.locate(tmp_path), requested), "nnU-Net paths").status == "ok"


def test_one_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_raw", "raw")
    checks = run_checks(Workspace.locate(tmp_path))
    assert find(checks, "workspace").status == "ok"


@pytest.mark.parametrize("place", ["site-packages", "package", "trainers", "nnunet"])
def test_trainers_sought_among_installed_packages(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnunetv2

    import diffseg_nnunet.trainers as trainers

    folder = {
        "site-packages": Path(sysconfig.get_paths()["purelib"]),
        "package": SHIM_FOLDER.parent,
        "trainers": Path(trainers.__path__[0]),
        "nnunet": Path(nnunetv2.__path__[0]),
    }[place]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(SHIM_FOLDER), str(folder)]))
    check = find(run_checks(Workspace.locate(tmp_path)), "nnUNet_extTrainer")
    assert check.status == "problem"
    assert str(SHIM_FOLDER) in (check.mend or "")


def test_our_own_trainer_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(SHIM_FOLDER))
    check = find(run_checks(Workspace.locate(tmp_path)), "nnUNet_extTrainer")
    assert check == Check("nnUNet_extTrainer", "ok", "finds our trainers")


def test_other_trainer_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert "without our trainers" in find(run_checks(Workspace.locate(tmp_path)), "nnUNet_extTrainer").finding
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "gone"))
    assert find(run_checks(Workspace.locate(tmp_path)), "nnUNet_extTrainer").status == "warning"


@pytest.mark.parametrize("variable", ["nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
@pytest.mark.parametrize(
    ("value", "status"), [("0", "problem"), ("two", "problem"), ("-1", "problem"), ("1", "ok"), ("9999", "warning")]
)
def test_numbers_of_processes(
    variable: str, value: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert find(run_checks(Workspace.locate(tmp_path)), variable).status == status


@needs_no_gpu
@pytest.mark.parametrize(("value", "status"), [("t", "warning"), ("f", "ok"), ("yes", "warning")])
def test_compilation_without_a_gpu(value: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", value)
    assert find(run_checks(Workspace.locate(tmp_path)), "nnUNet_compile").status == status


def test_a_workspace_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    check = find(run_checks(Workspace.locate(tmp_path / "file")), "workspace")
    assert check.status == "problem"
    assert "--workspace" in (check.mend or "")


def test_an_activated_workspace_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables a command sets for itself are not held against the user."""
    for variable in (*NNUNET_VARIABLES, "nnUNet_def_n_proc", "nnUNet_n_proc_DA", "nnUNet_extTrainer"):
        monkeypatch.setenv(variable, "")  # so that they are taken back after the test
        monkeypatch.delenv(variable)
    workspace = Workspace.locate(tmp_path).activate()
    statuses = {check.name: check.status for check in run_checks(workspace, tmp_path)}
    for name in ("nnU-Net paths", "nnUNet_extTrainer", "nnUNet_n_proc_DA", "nnUNet_def_n_proc", "workspace"):
        assert statuses[name] == "ok"
