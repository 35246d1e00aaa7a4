"""The cases of a folder of images that are to be predicted."""

from __future__ import annotations

from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.case_by_case import FailedCase
from diffseg_nnunet.raw_dataset import Case, split_channel, visible_files


def input_cases(folder: Path, file_ending: str, channel_count: int) -> tuple[list[Case], list[FailedCase]]:
    """The cases of a folder in nnU-Net's naming, ``CASE_0000.nii.gz`` with one file per channel.

    A folder whose files have no channel numbers is understood too where the model has one channel.

    Returns:
        The cases, and those whose channel numbers are not 0 to `channel_count` - 1.

    Raises:
        BadInputError: the folder is missing or has no such images, or only some of its files have channel numbers.
    """
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", "Correct -i.")
    stems = {path: path.name.removesuffix(file_ending) for path in visible_files(folder, [file_ending])}
    if not stems:
        raise BadInputError(
            f"{folder} holds no image CASE_0000{file_ending}.",
            "Name the images as nnU-Net does, with the file ending the model was trained on.",
        )
    numbered = {path: split_channel(stem) for path, stem in stems.items()}
    without = [path.name for path, (_, channel) in numbered.items() if channel is None]
    if len(without) == len(stems) and channel_count == 1:
        return [Case(stem, (path,), None) for path, stem in sorted(stems.items(), key=lambda item: item[1])], []
    if without:
        raise BadInputError(
            f"{len(without)} file(s) in {folder} have no channel number, e.g. {without[0]}.",
            f"Name them as nnU-Net does: CASE_0000{file_ending}, one file per channel.",
        )
    by_case: dict[str, dict[int, Path]] = {}
    for path, (case, channel) in numbered.items():
        by_case.setdefault(case, {})[channel] = path
    cases, misnumbered = [], []
    for case, files in sorted(by_case.items()):
        if sorted(files) == list(range(channel_count)):
            cases.append(Case(case, tuple(files[channel] for channel in range(channel_count)), None))
        else:
            channels = ", ".join(f"{channel:04d}" for channel in sorted(files))
            wanted = ", ".join(f"{channel:04d}" for channel in range(channel_count))
            reason = f"its files in {folder} have the channel numbers {channels}, the model reads {wanted}."
            misnumbered.append(FailedCase(case, f"{reason} Rename them, or add what is missing."))
    return cases, misnumbered
