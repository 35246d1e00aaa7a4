"""What a training starts from: the pretrained checkpoint of a fold, whether it fits, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.pretrained import load_pretrained, weights_at
from diffseg_nnunet.patients import others_of
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import read_splits
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.raw_dataset import SPLITS_FILE
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training.adaptation import adapt, require_share
from diffseg_nnunet.training.settings import FinetuningSettings, ProbingSettings, SegmentationSettings, TrainingSettings

FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"
Fold = int | str


def find_pretrained(project: Project, configuration: str, fold: Fold) -> Path:
    """The pretrained checkpoint a fold may start from: its own, else the one of all cases, with a word of warning.

    Raises:
        BadInputError: there is none that left this fold's validation cases unseen.
    """
    root = project.model_folder("pretrain", configuration)
    own = root / f"fold_{fold}" / FINAL
    if own.is_file():
        return own
    shared = root / "fold_all" / FINAL
    if shared.is_file():
        project.reporter.warn(
            f"fold {fold} starts from a network pretrained on all cases: it has seen the images, not the labels, of "
            "this fold's validation cases, so their scores are no estimate for unseen patients"
        )
        return shared
    others = ", ".join(path.parent.name for path in sorted(root.glob(f"fold_*/{FINAL}"))) or "none"
    planned = diffseg_section(project.plans()).get("source")
    given = f"give {planned['checkpoint']}, which was planned for," if planned else "give one"
    raise BadInputError(
        f"There is no pretrained network for fold {fold} of {project.name} {configuration} (there: {others}).",
        f"Run `diffseg pretrain {project.id} -c {configuration} -f {fold}`, {given} with --pretrained, or train its "
        "twin with --strategy scratch.",
    )


def seen_in_pretraining(checkpoint: Mapping[str, Any], dataset: str, cases: list[str]) -> list[str]:
    """Those of `cases` of `dataset` that a pretrained checkpoint has seen."""
    return sorted(set(checkpoint.get("pool", {}).get(dataset, [])) & set(cases))


def learnt_in_training(checkpoint: Mapping[str, Any], project: Project) -> set[str]:
    """The cases of the data set whose labels a trained checkpoint, ours or stock nnU-Net's, has learnt, by the fold
    that it says it is of; none of one that does not say."""
    made = checkpoints.made_with(checkpoint)
    fold, plans, path = made.get("fold"), made.get("plans") or {}, project.preprocessed / SPLITS_FILE
    if "pool" in checkpoint or fold is None or plans.get("dataset_name") != project.name:
        return set()
    if fold == "all":
        return {case.identifier for case in project.raw().labelled_cases()}
    splits = read_splits(path) if path.is_file() else []
    return set(splits[int(fold)]["train"]) if int(fold) < len(splits) else set()


def is_planned_source(project: Project, digest: str | None) -> bool:
    """Whether a checkpoint, by its SHA-256, is the one the plan was made to start from."""
    return digest is not None and digest == diffseg_section(project.plans()).get("source", {}).get("sha256")


def refuse_misfit(
    project: Project, strategy: str, configuration_name: str, settings: TrainingSettings, source: Path, adapts: bool
) -> None:
    """Raises BadInputError if a checkpoint's weights are not the planned network's, or cannot be used as the settings
    want, before anything earlier is set aside.

    Args:
        strategy: the trainer's registered name.
        source: the checkpoint.
        adapts: whether weights are adapted where they do not fit.
    """
    own = _planned_weights(project, configuration_name)
    weights = _network_weights(checkpoints.load_safely(source), settings, source)
    time_steps = settings.probe.time_steps if isinstance(settings, ProbingSettings) else ()
    cascaded = project.configuration(configuration_name).previous_stage_name is not None
    if adapts and not cascaded and not time_steps:
        frozen = registry.load("trainers", strategy).frozen
        require_share(adapt(own, weights), str(source), configuration_name, frozen)
    else:
        checkpoints.require_same_network(own, weights, str(source))
    if time_steps:
        weights_at(load_pretrained(source, torch.device("cpu")), time_steps, str(source))


def probed(project: Project, configuration: str, settings: ProbingSettings, source: Path) -> ProbingSettings:
    """The settings of a probe with what it reads of a checkpoint's network, where that was not given: our own
    pretraining at some of its time steps, any other network as it is, and so one whose weights are adapted.

    Whether the checkpoint fits is for :func:`refuse_misfit` to say.

    Raises:
        BadInputError: the checkpoint is damaged, or how time steps are read was asked for, and none is.
    """
    content = checkpoints.load_safely(source)
    reason = None
    if settings.time_steps is not None:
        reason = None if settings.time_steps else "--probe-time-steps folded was given"
    elif "phases" not in content:
        reason = f"{source} is no checkpoint of `diffseg pretrain`"
    elif is_planned_source(project, checkpoints.file_digest(source)):
        own = _planned_weights(project, configuration)
        if checkpoints.differences(own, content["network_weights"]):
            reason = f"the weights of {source} are adapted to this plan, and its norms at other time steps are not"
    if reason is None:
        if settings.time_steps is None:
            return settings.reading(load_pretrained(source, torch.device("cpu")).settings.diffusion.timesteps)
        return settings.reading(None)
    if settings.noisy is not None:
        raise BadInputError(
            f"--probe-clean and --probe-noisy say how time steps are read, and none is: {reason}.",
            "Leave the option out: the image is read clean.",
        )
    project.reporter.info(f"the probe reads the network as it is, at no time step of a diffusion: {reason}")
    return settings.reading(None)


def _planned_weights(project: Project, configuration_name: str) -> Mapping[str, Tensor]:
    """Of the planned network before training; for their names and shapes."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager, dataset_json = PlansManager(project.plans()), project.dataset_json()
    configuration = manager.get_configuration(configuration_name)
    network = registry.load("trainers", "finetune").build_network_architecture(
        manager,
        configuration,
        determine_num_input_channels(manager, configuration, dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=True,
    )
    return network.state_dict()


def _network_weights(content: Mapping[str, Any], settings: TrainingSettings, source: Path) -> Mapping[str, Tensor]:
    """The stock network's weights in a checkpoint, folded at the time step that the settings name, if they do."""
    time_step = settings.fold_timestep if isinstance(settings, FinetuningSettings) else None
    if time_step is None:
        return content["network_weights"]
    return weights_at(load_pretrained(source, torch.device("cpu")), (time_step,), str(source))[0]


def start(project: Project, configuration: str, trainer: Any, source: Path, adapts: bool) -> None:
    """Give an initialised trainer the weights of a checkpoint, and say what they are worth for its fold.

    Args:
        adapts: whether weights are adapted where they do not fit.
    """
    reporter, content = project.reporter, checkpoints.load_safely(source)
    _warn_of_other_data(project, configuration, content, source)
    validation = trainer.do_split()[1]
    seen = seen_in_pretraining(content, project.name, validation)
    if seen and trainer.fold != "all":
        reporter.warn(
            f"{source} was pretrained on the images of {len(seen)} of this fold's validation cases, e.g. {seen[0]}"
        )
    others = sorted(others_of(validation, project.same_patient()))
    if (known := seen_in_pretraining(content, project.name, others)) and not seen and trainer.fold != "all":
        reporter.warn(
            f"{source} was pretrained on {len(known)} other scan(s) of this fold's validation patients, e.g. {known[0]}"
        )
    learnt = sorted(learnt_in_training(content, project) & set(validation))
    if learnt and trainer.fold != "all":
        reporter.warn(
            f"{source} was trained on the labels of {len(learnt)} of this fold's validation cases, e.g. {learnt[0]}: "
            "what they score says nothing of unseen patients"
        )
    weights = _network_weights(content, trainer.settings, source)
    if adapts:
        adaptation = trainer.adapt_from(weights, str(source))
        shares = ", ".join(f"{share:.1%} {kind}" for kind, share in adaptation.shares().items())
        reporter.info(f"starting from {source} (of the parameters {shares})")
    else:
        count = trainer.start_from(weights, str(source))
        reporter.info(f"starting from {source} ({count} tensors)")
    if isinstance(trainer.settings, ProbingSettings):
        reporter.info(f"the probe reads {trainer.settings.probe.words}")
    if isinstance(trainer.settings, FinetuningSettings) and trainer.settings.transfer == "encoder":
        reporter.info("only the encoder starts from there, the decoder from random weights (see --transfer)")
    if isinstance(trainer.settings, SegmentationSettings) and trainer.settings.keep_coordinates:
        reason = trainer.regulariser.take(content)
        if reason is not None:
            reporter.warn(f"the coordinate head that is kept starts from random weights: {reason}")


def preprocessed_otherwise(project: Project, configuration: str, checkpoint: Mapping[str, Any]) -> list[str]:
    """The entries of the plans by which a checkpoint's data were preprocessed otherwise than the project's; none where
    it does not say."""
    theirs, ours = checkpoints.made_with(checkpoint).get("plans", {}), project.plans()
    then = theirs.get("configurations", {}).get(configuration)
    if then is None:
        return []
    keys = ("spacing", "normalization_schemes", "use_mask_for_norm")
    differing = [key for key in keys if then.get(key) != ours["configurations"][configuration].get(key)]
    general = ("foreground_intensity_properties_per_channel", "transpose_forward")
    return differing + [key for key in general if theirs.get(key) != ours.get(key)]


def _warn_of_other_data(project: Project, configuration: str, checkpoint: Mapping[str, Any], weights: Path) -> None:
    """A network pretrained at another spacing or normalisation fits in shape, and helps less."""
    differing = preprocessed_otherwise(project, configuration, checkpoint)
    if differing:
        project.reporter.warn(f"{weights} was pretrained on data preprocessed otherwise: {', '.join(differing)} differ")
