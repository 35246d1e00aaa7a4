"""Command lines of nnU-Net's users: understood, or answered with what to write."""

from __future__ import annotations

import pytest

from diffseg_nnunet.cli.arguments import expand_lists
from diffseg_nnunet.cli.nnunet_spellings import understood
from diffseg_nnunet.errors import BadInputError


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("train 7 -f 0 --c", "train 7 -f 0"),
        ("train 7 -device cpu -pretrained_weights w.pth", "train 7 --device cpu --pretrained w.pth"),
        ("train -d 7 -f 0", "train 7 -f 0"),
        ("plan --gpu-memory 8 -d Dataset007_X", "plan Dataset007_X --gpu-memory 8"),
        ("predict 7 -i a -o b -chk best.pth", "predict -d 7 -i a -o b --checkpoint best.pth"),
        ("predict -d 7 -i a -o b --disable_tta -device=cpu", "predict -d 7 -i a -o b --no-mirroring --device=cpu"),
        ("predict -d 7 -i a -o b -step_size 0.7", "predict -d 7 -i a -o b --step-size 0.7"),
        ("predict -d 7 -i a -o b --continue_prediction -f 0 1", "predict -d 7 -i a -o b -f 0 1"),
        ("convert msd -p --id 7", "convert msd -p --id 7"),  # of other commands nothing is touched
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_what_is_understood(typed: str, ours: str) -> None:
    assert understood(typed.split()) == ours.split()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (
            "train 7 -tr nnUNetTrainer",
            "-tr is nnU-Net's, and none of `diffseg train`. The trainer is chosen by --strategy",
        ),
        ("predict -d 7 -i a -o b -num_parts 4 -part_id 0", "Divide the folder of images, with a -o for each part"),
        ("preprocess 7 -np 2", "export nnUNet_def_n_proc=N"),
        ("train 7 3d_fullres 0", "Write `diffseg train 7 -c 3d_fullres -f 0`"),
    ],
)
def test_what_is_answered(typed: str, answer: str) -> None:
    with pytest.raises(BadInputError) as refused:
        understood(typed.split())
    assert answer in f"{refused.value.message} {refused.value.mend}"


def test_a_list_before_the_data_set() -> None:
    with pytest.raises(BadInputError, match=r"Put it first: `diffseg run ID -f …`"):
        expand_lists(["run", "-f", "0", "1", "901"])
    assert expand_lists(["run", "-f", "0", "901"]) == ["run", "-f", "0", "901"]
    assert expand_lists(["run", "901", "-f", "0", "1"]) == ["run", "901", "-f", "0", "-f", "1"]
