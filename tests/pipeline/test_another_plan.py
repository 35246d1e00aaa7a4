"""Planned anew, a data set's networks are of several plans: none predicts by a plan that it was not trained by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock, Timeout

from diffseg_nnunet.cli.plan import _back_to_default
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.manifest import Manifest
from diffseg_nnunet.pipeline.planning import PlanRequest
from diffseg_nnunet.pipeline.run_request import ALL_LABELS, NO_CHECKPOINT, RunRequest

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

SHORT = ("--iterations", 4, "--optimizer", "adamw")


def test_folds_of_two_plans_do_not_predict_together(project: TinyProject) -> None:
    plans = project.preprocessed / "DiffSegPlans.json"
    first, weights = plans.read_text(), project.pretrained() / "checkpoint_final.pth"
    spaced = [15 if word == 14 else word for word in project.light_plan]
    predict = ("predict", "-d", project.name, "-i", project.test_images, "-o")
    same, planned, predicted, preprocessed, trained, gone = project.diffseg.in_one_process(
        [
            ("plan", 1),
            ("plan", 1, *spaced, "--unlabeled", 2),
            (*predict, project.folder / "before", "-f", 0),
            ("preprocess", 1, "-c", "3d_fullres"),
            ("train", 1, "-f", 1, "--pretrained", weights, *SHORT),
            (*predict, project.folder / "after", "-f", 0),
        ]
    )
    assert "planning for" not in same.ok().out  # as it was planned last
    assert "train/finetune/3d_fullres/fold_0 are of the plan before this one" in planned.ok().out
    (kept,) = project.preprocessed.glob("superseded_*_DiffSegPlans.json")
    assert json.loads(kept.read_text()) == json.loads(first) != json.loads(plans.read_text())
    predicted.ok()  # the plan beside the network is still its own
    preprocessed.ok()
    assert "the earlier fold_0, of other data, plan or settings, is kept as" in trained.ok().out
    gone.refused("There is no trained model", "trained there: fold_1")

    (aside,) = project.trained().parent.glob("superseded_fold_0_*")
    aside.rename(project.trained())
    lines = [(*predict, project.folder / "mixed", "-f", 0, 1), (*predict, project.folder / "second", "-f", 1)]
    lines.append(("export", 1, "-c", "3d_fullres", "--stock", project.folder / "model.zip"))
    mixed, second, exported = project.diffseg.in_one_process(lines)
    for refused in (mixed, exported):
        refused.refused("fold_0", "was trained by another plan than", "spacing", "-f")
    second.ok()
    assert not (project.folder / "mixed").exists()
    assert not (project.folder / "model.zip").exists()


def test_a_damaged_checkpoint_is_named(project: TinyProject) -> None:
    path = project.trained() / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    io = ("-i", project.test_images, "-o", project.folder / "out")
    lines = [("predict", "-d", 1, *io), ("export", 1, "-c", "3d_fullres", "--stock", project.folder / "model.zip")]
    for finished in project.diffseg.in_one_process(lines):
        finished.refused(f"{path} cannot be read as a checkpoint")


@pytest.mark.parametrize("content", ["{}", "[]", '{"stages": []}', '{"stages": {"plan": 1}}', "{"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "diffseg_run.json").write_text(content)
    with pytest.raises(BadInputError, match=r"diffseg_run\.json is (no manifest of a run|not readable)"):
        Manifest(tmp_path).stage("plan")


def test_where_a_run_starts() -> None:
    """From what is given, else as last time, but for the twin; and `none` is nothing."""
    last, given = {"pretrained": "a.pth", "strategy": "finetune"}, Path("b.pth")
    assert RunRequest().on_top_of(last).pretrained == Path("a.pth")
    assert RunRequest(pretrained=given).on_top_of(last).pretrained == given
    assert RunRequest(pretrained=NO_CHECKPOINT).on_top_of(last).pretrained is None
    assert RunRequest(strategy="scratch").on_top_of(last).pretrained is None
    assert RunRequest().on_top_of({**last, "strategy": "scratch"}).pretrained is None
    assert RunRequest(pretrained=given, strategy="scratch").on_top_of(last).pretrained == given  # to be refused


def test_a_learning_rate_is_of_one_strategy_and_optimizer() -> None:
    last = RunRequest(training={"optimizer": "adamw", "initial_lr": 0.004}).on_top_of({}).kept()

    def rate(**asked: Any) -> float | None:
        return RunRequest(**asked).on_top_of(last).training.get("initial_lr")

    assert rate() == rate(training={"optimizer": "adamw"}) == rate(strategy="finetune") == 0.004
    assert rate(training={"optimizer": "sgd"}) is rate(strategy="linear") is None
    assert rate(strategy="linear", training={"initial_lr": 0.1}) == 0.1


def test_what_a_plan_has_by_default_again() -> None:
    last = PlanRequest("8", "plain", 16, (6.0, 6.0, 6.0), (2, 3))
    lost = _back_to_default(last, PlanRequest("12"), {"gpu_memory"})
    assert lost == (
        "--backbone resenc (was plain), --base-features 32 (was 16), --spacing none (was 6 6 6), "
        "--unlabeled none (was 2 3)"
    )
    assert _back_to_default(PlanRequest(), PlanRequest("12"), {"gpu_memory"}) == ""
    from_checkpoint = PlanRequest("8", from_checkpoint="a.pth")
    assert "backbone" not in _back_to_default(last, from_checkpoint, {"from_checkpoint"})


def test_which_labels_a_run_learns_from() -> None:
    """As last time, but for `all` of them; a seed is that of a budget."""
    last = RunRequest(labels="2cases", label_seed=3).on_top_of({}).kept()
    asked = [
        (RunRequest(), ("2cases", 3)),
        (RunRequest(labels="10%"), ("10%", 3)),
        (RunRequest(label_seed=0), ("2cases", 0)),
        (RunRequest(labels=ALL_LABELS), (None, 0)),
        (RunRequest(labels=ALL_LABELS, label_seed=1), (None, 1)),  # to be refused
    ]
    for request, wanted in asked:
        filled = request.on_top_of(last)
        assert (filled.labels, filled.label_seed) == wanted


def test_two_processes_do_not_work_on_one_stage(tmp_path: Path) -> None:
    """Another file handle stands for the other process; a turn holds for what runs within it."""
    manifest = Manifest(tmp_path)
    with manifest.turn("train/x"):
        (lock,) = (tmp_path / "logs").glob("train_x.lock")
        with manifest.running("train/x", {}, {}), pytest.raises(Timeout):
            FileLock(lock).acquire(timeout=0)
    with FileLock(lock), pytest.raises(BadInputError, match="Another process is working on train/x"):
        manifest.turn("train/x").__enter__()
    assert manifest.is_finished("train/x", {})
