"""Prediction with a refiner: nnU-Net's sliding window, whose windows are refined before they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from diffseg_nnunet import registry
from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.predictor import STEP_SIZE
from diffseg_nnunet.raw_dataset import DATASET_JSON, read_json_object
from diffseg_nnunet.refinement.binary import unpack_state
from diffseg_nnunet.refinement.logits import bounded_logits, refined_logits
from diffseg_nnunet.refinement.network import REFINER_FORMAT, Refiner, RefinerArchitecture
from diffseg_nnunet.refinement.sampling import BernoulliSampler, NotFiniteError, refine, uncertain_voxels
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training.precision import Precision, choose_dtype, float_format
from diffseg_nnunet.training.refining import RefinementSettings
from diffseg_nnunet.training.seeding import derived_seed


@dataclass(frozen=True)
class RefineOptions:
    """How windows are refined. What is None is as the checkpoint's settings say, by which validation refined.

    Attributes:
        steps: of the reverse process.
        samples: masks drawn and averaged.
        sampler: "ddim" or "ancestral".
        threshold_bits: voxels whose prior has no more entropy than this are left as they are; None: all are refined.
        seed: of the draws, which are the same for every case.
    """

    steps: int | None = None
    samples: int | None = None
    sampler: BernoulliSampler | None = None
    threshold_bits: float | None = None
    seed: int = 0

    def completed(self, settings: RefinementSettings) -> RefineOptions:
        """The same, with what is None taken from the settings that a refiner was trained with."""
        steps = settings.sampling_steps or settings.diffusion.timesteps
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            samples=settings.samples if self.samples is None else self.samples,
            sampler=self.sampler or settings.sampler,
        )


class RefiningSegmentor(nn.Module):
    """A segmentor with its refiner: their weights as one state dict, the segmentor's outputs as they are."""

    def __init__(self, segmentor: nn.Module, refiner: Refiner):
        super().__init__()
        self.segmentor, self.refiner = segmentor, refiner

    def forward(self, image: Tensor) -> Tensor:
        return self.segmentor(image)

    def features(self, image: Tensor) -> list[Tensor]:
        """The segmentor's feature maps, as the refiner wants them."""
        return list(self.segmentor.encoder(image)[-len(self.refiner.architecture.pyramid_channels) :])


class RefiningPredictor(nnUNetPredictor):
    """nnU-Net's predictor of a :class:`RefiningSegmentor`.

    The prior of a window is the mean over its mirrored copies, as nnU-Net makes it; it is refined once, with the
    features of the window itself. Weighting, folds and export stay nnU-Net's. BadInputError is raised for an image of
    which the segmentor or the refiner says what is not finite.

    Args:
        diffusion: the process the refiner was trained with.
        options: how windows are refined; complete.
        regions: whether outputs are regions, which may overlap.
        precision: of the refiner's passes on a CPU, by which it was trained.

    Attributes:
        refined_voxels, seen_voxels: of the windows since :meth:`reset_share`.
    """

    def __init__(
        self,
        diffusion: BernoulliDiffusion,
        options: RefineOptions,
        regions: bool,
        precision: Precision = "auto",
        **of_nnunet: Any,
    ):
        super().__init__(**of_nnunet)
        self.diffusion, self.options, self.exclusive, self.precision = diffusion, options, not regions, precision
        self._chosen: tuple[torch.dtype | None, str] | None = None
        self._generator = torch.Generator(device=self.device)
        self.reset_share()

    def reset_share(self) -> None:
        self.refined_voxels = self.seen_voxels = 0

    @property
    def share(self) -> float:
        """Part of the windows' voxels that were refined."""
        return self.refined_voxels / max(1, self.seen_voxels)

    def _internal_predict_sliding_window_return_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        # here, since nnU-Net begins a case anew on the CPU where the GPU's memory runs out
        self._generator.manual_seed(derived_seed(self.options.seed))
        self._unusable = 0
        logits = super()._internal_predict_sliding_window_return_logits(*args, **kwargs)
        if self._unusable:
            raise BadInputError(
                f"What the segmentor or its refiner says is not finite in {self._unusable} window(s).",
                "Look at the scan with `diffseg verify`, or predict without --refine.",
            )
        return logits

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        logits = super()._internal_maybe_mirror_and_predict(x)
        prior = logits.float().softmax(1) if self.exclusive else logits.float().sigmoid()
        if not prior.isfinite().all():
            # told when all windows are done: nnU-Net's thread that fetches them would wait for ever, with the image
            self._unusable += 1
            return torch.zeros_like(logits)
        where = uncertain_voxels(prior, self.exclusive, self.options.threshold_bits)
        self.seen_voxels += where.numel()
        margin = self.diffusion.settings.prior_margin
        if not where.any():
            return bounded_logits(logits, margin, self.exclusive)
        self.refined_voxels += int(where.sum())
        network, options = self.network, self.options
        # as it was trained, not in the half precision that nnU-Net predicts in
        dtype = self._float_format(x)
        try:
            with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                features = network.features(x)
                refined = refine(
                    prior,
                    features,
                    x,
                    network.refiner,
                    self.diffusion,
                    options.steps,
                    options.samples,
                    self._generator,
                    sampler=options.sampler,
                    exclusive=self.exclusive,
                    threshold_bits=options.threshold_bits,
                )
        except NotFiniteError:
            self._unusable += 1
            return torch.zeros_like(logits)
        return refined_logits(logits, prior, refined.probability, margin, self.exclusive, where)

    def _float_format(self, x: Tensor) -> torch.dtype | None:
        """Of the refiner's passes; on a CPU chosen once, on the first window, as in the training."""
        if self.device.type == "cuda":
            return float_format(self.device)
        if self._chosen is None:
            self._chosen = choose_dtype(self.precision, self.network, x)
        return self._chosen[0]


def load_refining_predictor(
    model_folder: Path,
    folds: Sequence[int | str],
    device: torch.device,
    mirroring: bool,
    checkpoint: str,
    options: RefineOptions,
    step_size: float = STEP_SIZE,
) -> RefiningPredictor:
    """A predictor with the refined folds of a model folder; nothing in their checkpoints is executed.

    Raises:
        BadInputError: as :func:`read_refiners`.
    """
    contents = read_refiners(model_folder, folds, checkpoint, options)
    settings = RefinementSettings(**contents[0]["settings"])
    options = options.completed(settings)
    plans = PlansManager(read_json_object(model_folder / "plans.json"))
    dataset_json = read_json_object(model_folder / DATASET_JSON)
    configuration = contents[0]["init_args"]["configuration"]
    segmentor = registry.load("trainers", "refine").planned_segmentor(plans.plans, configuration, dataset_json)
    refiner = Refiner(RefinerArchitecture(**contents[0]["refiner_architecture"]), settings.diffusion.prior_margin)
    predictor = RefiningPredictor(
        BernoulliDiffusion(settings.diffusion),
        options,
        plans.get_label_manager(dataset_json).has_regions,
        settings.precision,
        tile_step_size=step_size,
        use_mirroring=mirroring,
        device=device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        RefiningSegmentor(segmentor, refiner),
        plans,
        plans.get_configuration(configuration),
        [_weights(content, refiner) for content in contents],
        dataset_json,
        contents[0]["trainer_name"],
        contents[0]["inference_allowed_mirroring_axes"],
    )
    return predictor


def read_refiners(
    model_folder: Path, folds: Sequence[int | str], checkpoint: str, options: RefineOptions
) -> list[Mapping[str, Any]]:
    """The checkpoints of refined folds that predict together, in their order; nothing in them is executed.

    Raises:
        BadInputError: a checkpoint is none of a refiner, the folds' refiners differ in kind, or more steps are asked
            for than they were trained with.
    """
    contents = [_read(model_folder / f"fold_{fold}" / checkpoint) for fold in folds]
    settings = [RefinementSettings(**content["settings"]) for content in contents]
    kinds = [
        (content["refiner_architecture"], each.diffusion) for content, each in zip(contents, settings, strict=True)
    ]
    where = f"The refiners of the folds {', '.join(map(str, folds))} in {model_folder}"
    if any(kind != kinds[0] for kind in kinds):
        raise BadInputError(
            f"{where} differ in size or time steps.",
            "Refine all of them with the same options, or predict with one fold.",
        )
    _check_steps(options, settings[0])
    if len({options.completed(each) for each in settings}) > 1:
        raise BadInputError(
            f"{where} were validated with different samples, steps or samplers.",
            "Give --samples, --steps and --sampler, or predict with one fold.",
        )
    return contents


def _read(path: Path) -> Mapping[str, Any]:
    content = checkpoints.load_safely(path)
    missing = [
        key for key in ("refiner_weights", "refiner_architecture", "segmentor", "settings") if key not in content
    ]
    if missing:
        raise BadInputError(f"{path} is no refiner: it has no {', '.join(missing)}.", "Run `diffseg refine`.")
    if content.get("refiner_format") != REFINER_FORMAT:
        raise BadInputError(f"{path} is a refiner of another version of diffseg_nnunet.", "Run `diffseg refine` again.")
    return content


def _weights(content: Mapping[str, Any], refiner: Refiner) -> dict[str, Tensor]:
    parts = {"segmentor": content["network_weights"], "refiner": unpack_state(refiner, content["refiner_weights"])}
    return {f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()}


def _check_steps(options: RefineOptions, settings: RefinementSettings) -> None:
    most = settings.diffusion.timesteps
    if options.steps is not None and not 1 <= options.steps <= most:
        raise BadInputError(
            f"--steps {options.steps} cannot be: the refiner was trained with {most}.", f"Give --steps 1 to {most}."
        )
