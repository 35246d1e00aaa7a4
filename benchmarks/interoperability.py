"""Stock nnU-Net, as a subprocess, with our plans, weights and exported models, on real data.

Usage: python benchmarks/interoperability.py WORKSPACE [--cases 8]

WORKSPACE is that of benchmarks/hippocampus.py, with fold 0 trained.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import SimpleITK as sitk
from results import diffseg, table, write_section

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER

DATASET, NAME, CONFIGURATION, PLANS = "4", "Dataset004_Hippocampus", "3d_fullres", "DiffSegPlans"
# stands for an environment without diffseg_nnunet: any attempt to import it fails
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffseg_nnunet":
            raise ImportError("diffseg_nnunet is not installed here")
sys.meta_path.insert(0, Block())
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
sys.argv[0] = "nnUNetv2_predict"
predict_entry_point()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--cases", type=int, default=8)
    options = parser.parse_args()
    workspace = options.workspace.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        rows = [_training(workspace, scratch), *_predictions(workspace, scratch, options.cases)]
    write_section(
        "interoperability",
        "## Interoperability with stock nnU-Net, on hippocampus\n\nScript: `benchmarks/interoperability.py`. Stock "
        "commands run as subprocesses, everything in float32 on the CPU.\n\n"
        + table(("stock command", "result"), rows),
    )


def _environment(workspace: Path, results: Path, shim: bool) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "DIFFSEG"))}
    environment["nnUNet_raw"] = str(workspace / "nnUNet_raw")
    environment["nnUNet_preprocessed"] = str(workspace / "nnUNet_preprocessed")
    environment["nnUNet_results"] = str(results)
    environment["nnUNet_def_n_proc"] = "1"
    if shim:
        environment["nnUNet_extTrainer"] = str(SHIM_FOLDER)
    return environment


def _training(workspace: Path, scratch: Path) -> tuple[str, str]:
    """Start stock training from our weights, and stop it once its first epoch has begun."""
    pretrained = f"DiffSegPretrainer__{PLANS}__{CONFIGURATION}/fold_0/checkpoint_final.pth"
    checkpoint = workspace / "nnUNet_results" / NAME / pretrained
    command = ["nnUNetv2_train", DATASET, CONFIGURATION, "0", "-p", PLANS, "-device", "cpu"]
    log = scratch / "train.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [*command, "-pretrained_weights", str(checkpoint)],
            env=_environment(workspace, scratch / "stock_results", shim=False),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = monotonic() + 300
        while monotonic() < deadline and process.poll() is None and "Epoch 0" not in log.read_text():
            sleep(1)
        started = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text()
    copied = sum(" shape torch.Size" in line for line in text.splitlines())
    assert started, text[-2000:]
    assert copied, text[-2000:]
    return "`nnUNetv2_train … -pretrained_weights`", f"takes over {copied} tensors and begins epoch 0"


def _predictions(workspace: Path, scratch: Path, count: int) -> list[tuple[str, str]]:
    images, ours = scratch / "images", scratch / "ours"
    images.mkdir()
    validation = (
        workspace / "nnUNet_results" / NAME / f"DiffSegTrainer__{PLANS}__{CONFIGURATION}" / "fold_0" / "validation"
    )
    cases = sorted(path.name.removesuffix(".nii.gz") for path in validation.glob("*.nii.gz"))[:count]
    for case in cases:
        shutil.copy(workspace / "nnUNet_raw" / NAME / "imagesTr" / f"{case}_0000.nii.gz", images)
    common = ("-d", DATASET, "-c", CONFIGURATION, "-f", "0", "-i", images)
    diffseg("predict", *common, "-o", ours, "--device", "cpu", "--workspace", workspace)
    archive, installed = scratch / "model.zip", scratch / "installed"
    diffseg("export", DATASET, "-c", CONFIGURATION, "--stock", archive, "--workspace", workspace)
    installed.mkdir()
    subprocess.run(
        ["nnUNetv2_install_pretrained_model_from_zip", str(archive)],
        env=_environment(workspace, installed, shim=False),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shimmed, exported = scratch / "shimmed", scratch / "exported"
    stock = [*map(str, common), "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1"]
    _run(
        ["nnUNetv2_predict", *stock, "-o", str(shimmed), "-tr", "DiffSegTrainer"],
        _environment(workspace, workspace / "nnUNet_results", shim=True),
    )
    _run(
        [sys.executable, "-c", BLOCKED, *stock, "-o", str(exported), "-tr", "nnUNetTrainer"],
        _environment(workspace, installed, shim=False),
    )
    return [
        ("`nnUNetv2_predict -tr DiffSegTrainer`, our shim on nnUNet_extTrainer", _difference(ours, shimmed, cases)),
        ("`nnUNetv2_predict` with the exported zip, diffseg_nnunet not importable", _difference(ours, exported, cases)),
    ]


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def _difference(ours: Path, theirs: Path, cases: list[str]) -> str:
    differing = voxels = 0
    for case in cases:
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / f"{case}.nii.gz"))) for f in (ours, theirs))
        differing += int(np.count_nonzero(a != b))
        voxels += a.size
    return f"{differing} of {voxels} voxels differ from `diffseg predict` ({len(cases)} cases)"


if __name__ == "__main__":
    main()
