"""The README's torchrun command, as users start it: two processes on one machine, without a GPU."""

from __future__ import annotations

import json
import sys

from tests.conftest import Finished

from .conftest import TinyProject

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "diffseg_nnunet")


def test_two_processes_share_both_stages(project: TinyProject) -> None:
    def diffseg(*arguments: object) -> Finished:
        return project.diffseg.start_other(*TORCHRUN, *arguments, OMP_NUM_THREADS=1).wait()

    before = project.manifest()
    refused = diffseg("pretrain", 1, "--iterations", 2, "--seed", 5)
    assert refused.code != 0
    assert "A batch of a pair cannot be shared equally by 2 processes" in refused.err
    assert project.manifest() == before, "what was finished stays so"

    path = project.preprocessed / "DiffSegPlans.json"
    plans = json.loads(path.read_text())
    plans["diffseg"]["configurations"]["3d_fullres"]["pretraining"]["batch_size"] = 4
    path.write_text(json.dumps(plans))
    pretraining = diffseg("pretrain", 1, "--iterations", 2, "--seed", 5).ok()
    assert pretraining.out.count("pretrained network, in stock nnU-Net's format") == 1, "the first process alone speaks"
    stage = project.stage("pretrain/3d_fullres/fold_0")
    assert (stage["status"], stage["settings"]["iterations"]) == ("finished", 2)
    assert sorted(stage["outputs"]["cases_seen"][project.name]) == sorted(project.splits()[0]["train"])

    diffseg("train", 1, "--iterations", 2, "--optimizer", "adamw", "--seed", 5).ok()
    assert project.stage("train/finetune/3d_fullres/fold_0")["status"] == "finished"
    assert (project.trained() / "validation_report" / "scores.json").is_file()
    assert len(list(project.results.rglob("superseded_fold_0_*"))) == 2, "the earlier two, once each"

    diffseg("refine", 1, "--segmentor", "alternate", "--iterations", 2, "--width", 8).ok()
    for folder in ("validation", "validation_segmentor"):
        predicted = (project.model("DiffSegRefinerTrainer") / "fold_0" / folder).glob("*.nii.gz")
        assert len(list(predicted)) == len(project.splits()[0]["val"])
