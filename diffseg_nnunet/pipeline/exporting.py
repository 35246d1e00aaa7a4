"""The stage *export*: a trained model as a zip that stock nnU-Net installs and predicts with."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.one_plan import require_one_plan
from diffseg_nnunet.pipeline.folds import trained_folds
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.selection import folds_named
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.planning.section import PLANS_NAME

STOCK_TRAINER = "nnUNetTrainer"
_KEPT = ("network_weights", "init_args", "inference_allowed_mirroring_axes", "_best_ema", "current_epoch", "logging")


def export_stock(
    project: Project, configuration: str, target: Path, strategy: str = "finetune", folds: Sequence[Fold] | None = None
) -> list[str]:
    """Write a zip for ``nnUNetv2_install_pretrained_model_from_zip``; predicting needs no diffseg_nnunet.

    The network is stock nnU-Net's already, so only the trainer's name changes; the optimiser's state is left out.

    Args:
        folds: None: those of :func:`trained_folds`.

    Returns:
        The folds in the zip.

    Raises:
        BadInputError: no such fold is trained, or not by one plan, `target` is no .zip, or the strategy's result is no
            stock network.
    """
    if not registry.load("trainers", strategy).is_stock:
        raise BadInputError(
            f"A model of --strategy {strategy} has a head that stock nnU-Net does not know.",
            "Predict with `diffseg predict`, or export one of --strategy finetune, decoder or scratch.",
        )
    if target.suffix != ".zip":
        raise BadInputError(f"{target} does not end in .zip.", "Give --stock OUT.zip.")
    folder = project.model_folder(strategy, configuration)
    trained = sorted(path.parent.name for path in folder.glob(f"fold_*/{FINAL}"))
    chosen = [f"fold_{fold}" for fold in folds or trained_folds(project, strategy, (configuration,))]
    missing = [name for name in chosen if name not in trained]
    if missing or not chosen:
        but, way = "", ""
        if trained and not folds:
            but, way = f" but of label budgets ({', '.join(trained)})", ", or name folds with -f"
        raise BadInputError(
            f"{folder} has no trained {', '.join(missing) or 'fold'}{but}.",
            f"Run `diffseg train {project.id} -c {configuration} -f …` first{way}.",
        )
    require_one_plan(folder, [name.removeprefix("fold_") for name in chosen], FINAL)
    root = f"{project.name}/{STOCK_TRAINER}__{PLANS_NAME}__{configuration}"
    write_file(target, lambda path: _write_zip(path, folder, root, chosen))
    return chosen


def postprocessing_of(project: Project, configuration: str, strategy: str, folds: Sequence[str]) -> Path | None:
    """What a selection has chosen for these folds (``fold_0``, …) together; None where none was made."""
    numbers = folds_named([fold.removeprefix("fold_") for fold in folds])
    path = project.model_folder(strategy, configuration) / f"crossval_results_{numbers}" / "postprocessing.pkl"
    return path if path.is_file() else None


def _write_zip(path: Path, folder: Path, root: str, folds: Sequence[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
            archive.writestr(f"{root}/{name}", json.dumps(json.loads((folder / name).read_text()), indent=2))
        for fold in folds:
            archive.writestr(f"{root}/{fold}/{FINAL}", _stock_checkpoint(folder / fold / FINAL))
            for extra in ("progress.png", "validation/summary.json"):
                if (folder / fold / extra).is_file():
                    archive.write(folder / fold / extra, f"{root}/{fold}/{extra}")


def _stock_checkpoint(path: Path) -> bytes:
    import torch

    # nnU-Net's own checkpoint format, a pickle, written by this workspace's training
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    stock = {key: checkpoint[key] for key in _KEPT if key in checkpoint}
    stock.update(trainer_name=STOCK_TRAINER, optimizer_state=None, grad_scaler_state=None)
    buffer = io.BytesIO()
    torch.save(stock, buffer)
    return buffer.getvalue()
