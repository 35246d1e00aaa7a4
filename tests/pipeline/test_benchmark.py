"""``diffseg benchmark``, killed and gone on with; what has other settings is not taken for what is wanted."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch

from diffseg_nnunet.training.checkpoint import load_safely

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

WHAT = ("--budgets", "1case", "--seeds", 3, "--strategies", "finetune", "--optimizer", "adamw")
LENGTHS = ("--iterations", 6, "--pretrain-iterations", 2)
COMMAND = ("benchmark", "few-label", 1, *WHAT, *LENGTHS)


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_killed_and_gone_on_with(planned_project: TinyProject) -> None:
    project = planned_project
    output = project.results / "benchmark_few-label"
    twin, tuned = (output / "runs" / f"seed3_fold0_1case_{strategy}" for strategy in ("scratch", "finetune"))
    project.diffseg(*COMMAND, "--report-only").refused("No run of this benchmark has finished")
    listed = project.diffseg(*COMMAND, "--dry-run").ok().out
    assert listed.count("to do") == 2 + 1  # each run, and their sum
    assert not output.exists()

    running = project.diffseg.start(*COMMAND)
    deadline = time.monotonic() + 300
    while not (twin / "run.json").is_file():
        assert running.process.poll() is None, running.wait()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.kill()
    first = record(twin)
    assert first["status"] == "finished", first["reason"]
    project.diffseg(*COMMAND, "--report-only").ok()
    assert "1 finished, 1 to do" in (output / "table.md").read_text()
    assert not (tuned / "run.json").exists()
    checkpoints = {path: path.stat().st_mtime_ns for path in project.results.rglob("fold_*/checkpoint_final.pth")}

    longer = ("benchmark", "few-label", 1, *WHAT, "--iterations", 8, "--pretrain-iterations", 2, "--dry-run")
    rest, done, other = project.diffseg.in_one_process([COMMAND, (*COMMAND, "--dry-run"), longer])
    assert "seed3_fold0_1case_scratch: scored before, unchanged" in rest.ok().out
    assert "all runs are finished" in done.ok().out
    assert other.ok().out.count("other settings") == 2
    assert "2 run(s) to do, about" in other.out
    assert (
        checkpoints.items()
        <= {path: path.stat().st_mtime_ns for path in project.results.rglob("fold_*/checkpoint_final.pth")}.items()
    )
    assert record(twin) == first
    check_report(project, output, record(tuned))
    given = output / "networks" / project.name / project.pretrained().relative_to(project.results)
    check_given_checkpoint(project, given / "checkpoint_final.pth", output)
    check_another_benchmark(project, record(twin), record(tuned), output)


def check_another_benchmark(project: TinyProject, *records: Any) -> None:
    """Of the same data set and labels, with another plan and length: what was scored before is not trained again, and
    what this benchmark was planned with comes back."""
    *runs, output = records
    before = json.loads((output / "benchmark.json").read_text())
    shorter = ("benchmark", "few-label", 1, *WHAT, "--iterations", 4, "--pretrain-iterations", 3, "--gpu-memory", 1.1)
    # one process each: nnU-Net reads once where results go
    other, again = (project.diffseg(*each) for each in ((*shorter, "-o", project.folder / "shorter"), COMMAND))
    assert "is kept as" not in other.ok().out.replace("\n", " ")
    assert again.ok().out.count("scored before, unchanged") == 2
    assert "epoch" not in again.out
    after = json.loads((output / "benchmark.json").read_text())
    assert after | {"written": ""} == before | {"written": ""}, "also what the pretraining saw"
    assert [record(output / "runs" / f"seed3_fold0_1case_{name}") for name in ("scratch", "finetune")] == runs


def check_given_checkpoint(project: TinyProject, given: Path, earlier: Path) -> None:
    folder, seen = project.folder / "given", project.splits()[0]["train"][0]
    from_it = ("benchmark", "few-label", 1, *WHAT, "--iterations", 6, "--pretrained", given)
    run = project.diffseg(*from_it, "-o", folder)
    on_seen, lengths = project.diffseg.in_one_process(
        [(*from_it, "--test-cases", seen), (*from_it, "--pretrain-iterations", 6)]
    )
    run.ok()
    manifest, before = (json.loads((each / "benchmark.json").read_text()) for each in (folder, earlier))
    assert hashlib.sha256(given.read_bytes()).hexdigest() in manifest["pretraining"]
    assert manifest["pretraining_saw"] == before["pretraining_saw"]
    assert manifest["results"] == before["results"], "it is the checkpoint the benchmark had made itself"
    unsaid = project.folder / "unsaid.pth"
    torch.save({key: value for key, value in load_safely(given).items() if key != "pool"}, unsaid)
    from_unsaid = project.diffseg(*from_it[:-1], unsaid, "-o", project.folder / "unsaid").ok()
    assert "does not record what it was trained on" in from_unsaid.out.replace("\n", " ")
    manifest = json.loads((project.folder / "unsaid" / "benchmark.json").read_text())
    assert manifest["pretraining_saw"] == {"fold_0": None}
    on_seen.refused("was pretrained on the images of 1 test case", seen)
    lengths.refused("--pretrain-iterations does not go with --pretrained")


def check_report(project: TinyProject, output: Path, tuned: dict[str, Any]) -> None:
    manifest = json.loads((output / "benchmark.json").read_text())
    base, drawn = project.splits()[0], project.splits()[5]
    assert manifest["split"]["folds"] == [{"train": sorted(base["train"]), "val": sorted(base["val"])}]
    saw = manifest["pretraining_saw"]["fold_0"]
    assert sorted(saw[project.name]) == sorted(base["train"])
    assert len(saw[project.pool_name]) == 4
    assert manifest["flare_legal"] is False
    assert "converted as 'folder'" in manifest["flare_legal_reason"]
    assert {run["state"] for run in manifest["runs"].values()} == {"finished"}
    assert tuned["labelled_cases"] == len(drawn["train"]) == 1
    assert tuned["seconds"] > 0
    own = json.loads((output / "networks" / project.name / "diffseg_run.json").read_text())["stages"]
    settings = [own[f"train/{name}/3d_fullres/fold_5"]["settings"] for name in ("scratch", "finetune")]
    assert not [name for name in project.manifest()["stages"] if name.startswith(("train", "pretrain"))]
    assert settings[1] == settings[0] | {"transfer": "encoder", "fold_timestep": None}, "the twin has the same budget"
    assert settings[0]["seed"] == 3
    assert settings[0]["initial_lr"] is None, "`diffseg run` keeps what was asked for: the rate is the optimizer's"

    table = pd.read_csv(output / "table.csv")
    assert set(table.strategy) == {"scratch", "finetune"}
    overall = table[(table.structure == "mean over structures") & (table.metric == "dsc")].set_index("strategy")
    expected = overall["mean"]["finetune"] - overall["mean"]["scratch"]
    assert overall.difference["finetune"] == pytest.approx(expected)
    text = (output / "table.md").read_text()
    assert "FLARE22-legal: **no**" in text
    assert "No published figure" in text
    for picture in ("curve.png", "learning_curves.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_what_is_trained_already_stays_as_it_is(project: TinyProject) -> None:
    """A benchmark of a data set that has networks, with other lengths; and with another plan, which is refused."""
    models = {path: path.stat().st_mtime_ns for path in project.results.rglob("fold_0/checkpoint_final.pth")}
    assert len(models) == 2
    stages = project.manifest()["stages"]
    project.diffseg(*COMMAND, "--gpu-memory", 1.1).refused("is planned otherwise, and has networks", "--id")
    project.diffseg(*COMMAND).ok()
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert project.manifest()["stages"] | stages == project.manifest()["stages"], "nothing but verify is added"
    # nor does a label budget's network, in the place of a user's own, join what is exported
    exported = project.diffseg("export", 1, "--stock", "model.zip").ok()
    assert "model.zip: fold_0\n" in exported.out


def test_bad_input(planned_project: TinyProject) -> None:
    project = planned_project
    before = project.manifest()
    command = ("benchmark", "few-label", 1, *LENGTHS)
    refusals = {
        ("benchmark", "amos", 1): ("There is no benchmark 'amos'", "few-label"),
        ("benchmark", "few-label", "download"): ("'download' is no id", "diffseg convert"),
        ("benchmark", "btcv", "download"): ("needs an id", "--id"),
        (*command, "--budgets", "2scans"): ("'2scans' is no label budget",),
        (*command, "--strategies", "magic"): ("--strategies magic is not known", "finetune"),
        (*command, "--test-cases", "phantom_000", "nobody"): ("no labelled case nobody", "phantom_000"),
        (*command, "--evaluation", "btcv13"): ("There is no protocol 'btcv13'",),
        (*command, "--test-cases", "phantom_000", "--fold", 1): ("--fold does not go with --test-cases",),
        ("benchmark", "btcv", 1): ("do not make the split '24/6'", "--test-cases"),
        ("benchmark", "btcv", project.folder / "phantom", "--id", 1): ("The id belongs to Dataset001_Phantom",),
    }
    for finished, words in zip(project.diffseg.in_one_process(list(refusals)), refusals.values(), strict=True):
        finished.refused(*words)
    assert project.manifest() == before
