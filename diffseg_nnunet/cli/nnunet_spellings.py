"""What users of nnU-Net's commands type out of habit: understood where we mean the same, else answered in words."""

from __future__ import annotations

from diffseg_nnunet.errors import BadInputError

_ALIASES = {
    "-chk": "--checkpoint",
    "-device": "--device",
    "--disable_tta": "--no-mirroring",
    "-pretrained_weights": "--pretrained",
    "-step_size": "--step-size",
}
_ALWAYS_SO = ("--c", "--continue_prediction")
"""Whatever was interrupted goes on."""
_PROCESSES = "processes are as many as cores; export nnUNet_def_n_proc=N for fewer"
_PARTS = "divide the folder of images, with a -o for each part"
_ANSWERS = {
    "-tr": "the trainer is chosen by --strategy",
    "-p": "the plans are always DiffSegPlans",
    "-pl": "the planner is chosen by --backbone",
    "-overwrite_plans_name": "the plans are always DiffSegPlans; plan otherwise in another workspace",
    "-gpu_memory_target": "write --gpu-memory",
    "-overwrite_target_spacing": "write --spacing",
    **dict.fromkeys(("-np", "-npp", "-nps"), _PROCESSES),
    "-num_gpus": "start `torchrun --nproc_per_node=N -m diffseg_nnunet train …`",
    **dict.fromkeys(("-num_parts", "-part_id"), _PARTS),
    "--val": "a finished fold's validation cases are segmented already, in its folder validation",
    "--val_best": "predict with `diffseg predict --checkpoint checkpoint_best.pth`",
    "-prev_stage_predictions": "a cascade's first stage is predicted with on the way",
    "--verify_dataset_integrity": "`diffseg verify` does that, and `diffseg run` by itself",
}
_COMMANDS = ("train", "pretrain", "refine", "predict", "run", "plan", "preprocess", "coordinates", "verify", "labels")


def understood(arguments: list[str]) -> list[str]:
    """A command line, its nnU-Net spellings in ours.

    Raises:
        BadInputError: one of them has no counterpart of one word; the message says what to write.
    """
    if not arguments or arguments[0] not in _COMMANDS:
        return arguments
    command, ours = arguments[0], [arguments[0]]
    for argument in arguments[1:]:
        option, equals, value = argument.partition("=")
        if option in _ANSWERS:
            raise BadInputError(f"{option} is nnU-Net's, and none of `diffseg {command}`.", f"{_said(option)}.")
        if option not in _ALWAYS_SO:
            ours.append(f"{_ALIASES.get(option, option)}{equals}{value}")
    return _positions_checked(command, ours)


def _said(option: str) -> str:
    text = _ANSWERS[option]
    return text[0].upper() + text[1:]


def _positions_checked(command: str, arguments: list[str]) -> list[str]:
    """``train -d 7`` as ``train 7``, ``predict 7`` as ``predict -d 7``; configuration and fold by place are refused."""
    if command in ("predict", "coordinates"):
        if len(arguments) > 1 and not arguments[1].startswith("-"):
            return [command, "-d", *arguments[1:]]
        return arguments
    if "-d" in arguments[1:-1]:
        place = arguments.index("-d", 1)
        return [command, arguments[place + 1], *arguments[1:place], *arguments[place + 2 :]]
    if len(arguments) > 3 and command == "train" and not any(each.startswith("-") for each in arguments[1:4]):
        dataset, configuration, fold = arguments[1:4]
        raise BadInputError(
            f"Configuration and fold are options: {configuration} {fold} are at no place of `diffseg train`.",
            f"Write `diffseg train {dataset} -c {configuration} -f {fold}`.",
        )
    return arguments
