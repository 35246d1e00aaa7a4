"""The folds stay true to the cases there are, and a user's own splits are never touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline import splits as splits_module
from diffseg_nnunet.pipeline.held_back import warn_of_divided_patients
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.workspace import Workspace

from .conftest import Recorder


class PreprocessedProject(Project):
    """A project whose preprocessed cases lie in one folder, without plans."""

    def labelled_preprocessed(self, configuration: str) -> tuple[str, ...]:
        return tuple(sorted(path.stem for path in self.preprocessed.glob("*.pkl")))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    workspace = Workspace(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")
    project = PreprocessedProject(workspace, "Dataset001_Test", Recorder())
    project.preprocessed.mkdir(parents=True)
    return project


def add_cases(project: Project, *names: str) -> None:
    for name in names:
        (project.preprocessed / f"{name}.pkl").touch()


def test_five_folds_partition_the_cases(project: Project) -> None:
    names = [f"case_{number:02d}" for number in range(11)]
    add_cases(project, *names)
    folds = splits_module.ensure_splits(project, "3d_fullres")
    assert sorted(case for fold in folds for case in fold["val"]) == names
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == names
    assert json.loads((project.preprocessed / "splits_final.json").read_text()) == folds


def test_splits_of_the_conversion_are_taken(project: Project) -> None:
    add_cases(project, "a", "b", "c")
    raw = project.workspace.raw / project.name
    raw.mkdir(parents=True)
    chosen = [{"train": ["c"], "val": ["a", "b"]}]
    (raw / "splits_final.json").write_text(json.dumps(chosen))
    assert splits_module.ensure_splits(project, "3d_fullres") == chosen
    assert json.loads((project.preprocessed / "splits_final.json").read_text()) == chosen
    # from then on, the preprocessed ones count
    (raw / "splits_final.json").write_text("no splits")
    assert splits_module.ensure_splits(project, "3d_fullres") == chosen


def test_splits_of_the_conversion_must_fit_the_cases(project: Project) -> None:
    add_cases(project, "a", "b")
    raw = project.workspace.raw / project.name
    raw.mkdir(parents=True)
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["gone"]}]))
    with pytest.raises(BadInputError, match=r"names 1 case.* does not have preprocessed, e.g. gone"):
        splits_module.ensure_splits(project, "3d_fullres")


def test_splits_are_those_of_stock_nnunet(project: Project) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    names = [f"case_{number:02d}" for number in range(12)]
    add_cases(project, *names)
    folds = splits_module.ensure_splits(project, "3d_fullres")
    stock = generate_crossval_split(names, seed=12345, n_splits=5)
    assert [fold["val"] for fold in folds] == [[str(case) for case in fold["val"]] for fold in stock]


def test_drawn_folds_follow_new_and_vanished_cases(project: Project) -> None:
    add_cases(project, "a", "b", "c")
    assert len(splits_module.ensure_splits(project, "3d_fullres")) == 3
    add_cases(project, "d")
    (project.preprocessed / "a.pkl").unlink()
    folds = splits_module.ensure_splits(project, "3d_fullres")
    assert sorted(case for fold in folds for case in fold["val"]) == ["b", "c", "d"]
    assert "drawn anew" in project.reporter.warnings[0]


def test_own_splits_are_kept_and_left_out_cases_named(project: Project) -> None:
    add_cases(project, "a", "b", "c")
    path = project.preprocessed / "splits_final.json"
    own = [{"train": ["a"], "val": ["b"]}]
    path.write_text(json.dumps(own))
    assert splits_module.ensure_splits(project, "3d_fullres") == own
    assert json.loads(path.read_text()) == own
    assert "leaves out 1 labelled case(s), e.g. c" in project.reporter.warnings[0]


def test_own_splits_with_unknown_cases_are_refused(project: Project) -> None:
    add_cases(project, "a", "b")
    (project.preprocessed / "splits_final.json").write_text('[{"train": ["a", "x"], "val": ["b"]}]')
    with pytest.raises(BadInputError, match=r"names 1 case\(s\) that Dataset001_Test does not have .* e\.g\. x"):
        splits_module.ensure_splits(project, "3d_fullres")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": []}', '[{"train": "a", "val": []}]', "[1]"])
def test_a_file_that_is_no_splits_file_is_refused(project: Project, content: str) -> None:
    add_cases(project, "a", "b")
    (project.preprocessed / "splits_final.json").write_text(content)
    with pytest.raises(BadInputError, match="is no nnU-Net splits file"):
        splits_module.ensure_splits(project, "3d_fullres")


def test_one_case_cannot_be_split(project: Project) -> None:
    add_cases(project, "a")
    with pytest.raises(BadInputError, match="too few for a split"):
        splits_module.ensure_splits(project, "3d_fullres")


def test_an_unknown_fold_is_refused(project: Project) -> None:
    add_cases(project, "a", "b", "c")
    splits_module.check_fold(project, "3d_fullres", "all")
    splits_module.check_fold(project, "3d_fullres", 2)
    with pytest.raises(BadInputError, match="has folds 0 to 2, not 3"):
        splits_module.check_fold(project, "3d_fullres", 3)


def set_patients(project: Project, *groups: list[str]) -> None:
    raw = project.workspace.raw / project.name
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "dataset.json").write_text(json.dumps({"same_patient": groups}))


def test_scans_of_one_patient_are_on_one_side(project: Project) -> None:
    names = [f"case_{number}" for number in range(6)]
    add_cases(project, *names)
    set_patients(project, names[:2], names[2:4])
    assert splits_module.expected_folds(project, names) == 4
    folds = splits_module.ensure_splits(project, "3d_fullres")
    assert sorted(fold["val"] for fold in folds) == [names[:2], names[2:4], names[4:5], names[5:]]
    # folds that were drawn are drawn anew with the cases, whatever is known of patients by then
    add_cases(project, "case_6")
    (project.preprocessed / "case_0.pkl").unlink()
    set_patients(project, names[2:4], ["case_5", "case_6"])
    assert splits_module.expected_folds(project, [*names[1:], "case_6"]) == 4
    folds = splits_module.ensure_splits(project, "3d_fullres")
    assert sorted(fold["val"] for fold in folds) == [["case_1"], names[2:4], ["case_4"], ["case_5", "case_6"]]
    assert "cases have come or gone since it was written, and they are drawn anew" in project.reporter.warnings[0]


def test_drawn_folds_that_divide_a_patient_are_drawn_anew(project: Project) -> None:
    names = [f"case_{number}" for number in range(10)]
    add_cases(project, *names)
    stock = splits_module.ensure_splits(project, "3d_fullres")
    (project.preprocessed / "drawn_folds.json").unlink()  # as stock nnU-Net, or an earlier version, has left them
    one, other = stock[0]["val"][0], stock[1]["val"][0]
    set_patients(project, [one, other])
    folds = splits_module.ensure_splits(project, "3d_fullres")
    assert any({one, other} <= set(fold["val"]) for fold in folds)
    assert "its folds divide patients, and they are drawn anew" in project.reporter.warnings[0]
    assert splits_module.ensure_splits(project, "3d_fullres") == folds
    assert len(project.reporter.warnings) == 1


def test_all_cases_of_one_patient_are_no_cross_validation(project: Project) -> None:
    add_cases(project, "a", "b")
    set_patients(project, ["a", "b"])
    with pytest.raises(BadInputError, match=r"All 2 labelled cases of Dataset001_Test are of one patient"):
        splits_module.ensure_splits(project, "3d_fullres")
    with pytest.raises(BadInputError, match=r"train on everything with `-f all`"):
        splits_module.expected_folds(project, ["a", "b"])


def test_own_splits_that_divide_a_patient_are_told(project: Project) -> None:
    set_patients(project, ["a", "b", "un"], ["c", "d"])
    (project.preprocessed / "splits_final.json").touch()
    cases = {"train": ["a", "c"], "val": ["b", "e"]}
    warn_of_divided_patients(project, 0, cases)
    assert "fold 0 trains on 1 other scan(s) of patients that it validates on, e.g. a" in project.reporter.warnings[0]
    warn_of_divided_patients(project, "all", cases)
    warn_of_divided_patients(project, 0, {"train": ["c", "d"], "val": ["b"]})
    assert len(project.reporter.warnings) == 1
