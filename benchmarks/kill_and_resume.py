"""SIGKILL during preprocess, pretrain and train of `diffseg run`: the next run finishes, and redoes nothing done.

Usage: python benchmarks/kill_and_resume.py TASK_FOLDER WORKSPACE    (an MSD task, e.g. Task04_Hippocampus)
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pandas as pd
import torch
from results import diffseg, table, write_section

DATASET, NAME = 4, "Dataset004_Hippocampus"
RUN = ("run", DATASET, "-c", "3d_fullres", "-f", 0, "--backbone", "plain", "--base-features", 8)
LENGTH = ("--pretrain-iterations", 40, "--iterations", 40, "--optimizer", "adamw", "--spacing", 2, 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("workspace", type=Path)
    options = parser.parse_args()
    ws = options.workspace.resolve()
    diffseg("convert", "msd", options.source, "--id", DATASET, "--workspace", ws)
    command = [str(a) for a in ("diffseg", *RUN, *LENGTH, "--workspace", ws)]
    cases = ws / "nnUNet_preprocessed" / NAME / "DiffSegPlans_3d_fullres"
    models = ws / "nnUNet_results" / NAME
    pretraining = models / "DiffSegPretrainer__DiffSegPlans__3d_fullres" / "fold_0"
    training = models / "DiffSegTrainer__DiffSegPlans__3d_fullres" / "fold_0"
    rows = []

    _kill_when(command, lambda: len(list(cases.glob("*.pkl"))) >= 60)
    before = {path.name: path.stat().st_mtime_ns for path in cases.glob("*.pkl")}
    _kill_when(command, (pretraining / "checkpoint_latest.pth").is_file)
    after = {path.name: path.stat().st_mtime_ns for path in cases.glob("*.pkl")}
    redone = sum(after[name] != stamp for name, stamp in before.items())
    rows.append(("preprocess", f"{len(before)} cases done", f"{redone} of them redone, {len(after)} in the end"))

    epoch = torch.load(pretraining / "checkpoint_latest.pth", weights_only=True)["current_epoch"]
    _kill_when(command, (training / "checkpoint_latest.pth").is_file)
    epochs = pd.read_csv(pretraining / "history.csv")["epoch"].tolist()
    assert epochs == list(range(len(epochs))), epochs
    rows.append(("pretrain", f"{epoch} epoch(s) done", f"0 redone, {len(epochs)} in the end, each once"))

    # nnU-Net's own format, written a moment ago by the command above
    done = torch.load(training / "checkpoint_latest.pth", weights_only=False)["current_epoch"]
    diffseg(*RUN, *LENGTH, "--workspace", ws)
    resumed = _epochs(sorted(training.glob("training_log*"))[-1])
    rows.append(("train", f"{done} epoch(s) done", f"0 redone, {max(resumed) + 1} in the end"))
    assert resumed[0] == done > 0, (done, resumed)

    stamp = (training / "checkpoint_final.pth").stat().st_mtime_ns
    start = monotonic()
    diffseg(*RUN, *LENGTH, "--workspace", ws)
    assert (training / "checkpoint_final.pth").stat().st_mtime_ns == stamp
    rows.append(("all", "run once more", f"nothing done again, {monotonic() - start:.0f} s"))
    write_section(
        "kill-and-resume",
        "## Kill and resume, on hippocampus\n\nScript: `benchmarks/kill_and_resume.py`. The process group of "
        "`diffseg run` gets SIGKILL within a stage; then the same command is given again.\n\n"
        + table(("stage", "when killed", "next run"), rows),
    )


def _epochs(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r"Epoch (\d+)", log.read_text())]


def _kill_when(command: list[str], reached: Callable[[], bool], timeout_s: float = 900) -> None:
    """Start the command and kill its process group once `reached()`."""
    print("$", *command, "   # to be killed", flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    deadline = monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert monotonic() < deadline, "the stage was not reached in time"
        sleep(0.05)
    sleep(0.5)  # somewhere within the next case or epoch
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
