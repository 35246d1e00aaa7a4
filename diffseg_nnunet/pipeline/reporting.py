"""``diffseg report``: what was done with a data set, and what came of it, as one page of HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.statistics import Evaluation
from diffseg_nnunet.pipeline.evaluating import evaluate_validation, not_scorable
from diffseg_nnunet.pipeline.planning import explained
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refiner_selection import Comparison
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.starting import FINAL
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.report.page import Paragraph, Part, Picture, Section, Table, write_page
from diffseg_nnunet.report.scores import PAGE, score_parts
from diffseg_nnunet.verification import Finding, UnreadableVolumeError, listed, read_volume, shortened

PICTURED = 3
_CURVES = "progress.png"
_TRAINING = re.compile(rf"(?:train/(?P<strategy>[^/]+)|{REFINE})/(?P<configuration>[^/]+)/fold_(?P<fold>\d+|all)")
_PRETRAINING = re.compile(r"pretrain/(?P<configuration>[^/]+)/fold_(?P<fold>\d+|all)")


@dataclass(frozen=True)
class TrainedFold:
    """A fold that is trained or refined.

    Attributes:
        trainer: its registered name, which for a training is the strategy.
        stage: its name in the manifest.
    """

    trainer: str
    configuration: str
    fold: int | str
    stage: str

    @property
    def title(self) -> str:
        return f"{self.trainer}, {self.configuration}, fold {self.fold}"


def write_project_report(project: Project, path: Path | None = None, pictured: int = PICTURED) -> Path:
    """Write the page; scores that are missing of a finished fold are computed, and kept.

    Args:
        path: None: ``report.html`` in the data set's results.
        pictured: so many of each fold's worst validation cases are shown.

    Raises:
        BadInputError: nothing was done with the data set yet.
    """
    content = project.manifest.read()
    stages: Mapping[str, Mapping[str, Any]] = content["stages"]
    if not stages:
        raise BadInputError(
            f"Nothing was done with {project.name} yet ({project.manifest.path}).", f"Run `diffseg run {project.id}`."
        )
    sections = [_data(project, stages), _plan(project), _stages(stages), _pretrainings(project, stages)]
    sections += [_fold(project, stages, trained, pictured) for trained in trained_folds(stages)]
    sections.append(_selection(stages))
    path = project.results / PAGE if path is None else path
    latest = max(stages.values(), key=lambda stage: stage["start"])
    packages = ", ".join(f"{name} {number}" for name, number in latest["versions"].items())
    write_page(path, project.name, packages, [section for section in sections if section.parts])
    return path


def trained_folds(stages: Mapping[str, Mapping[str, Any]]) -> list[TrainedFold]:
    """The finished ones, in the order in which they were begun."""
    found = []
    for name, stage in sorted(stages.items(), key=lambda item: item[1]["start"]):
        match = _TRAINING.fullmatch(name)
        if match is not None and stage["status"] == "finished":
            fold = match["fold"] if match["fold"] == "all" else int(match["fold"])
            found.append(TrainedFold(match["strategy"] or REFINE, match["configuration"], fold, name))
    return found


def _data(project: Project, stages: Mapping[str, Mapping[str, Any]]) -> Section:
    raw = project.raw()
    counts = [
        ("labelled", raw.labelled_cases()),
        ("unlabelled", raw.unlabelled_cases()),
        ("test", raw.test_cases()),
    ]
    parts: list[Part] = [
        Paragraph("Cases: " + ", ".join(f"{len(cases)} {role}" for role, cases in counts) + "."),
        Paragraph(f"Channels: {', '.join(raw.channel_names.values())}."),
        Paragraph(f"Structures: {', '.join(name for name in raw.labels if name not in ('background', 'ignore'))}."),
    ]
    findings = [Finding(**found) for found in stages.get("verify", {}).get("outputs", {}).get("findings", ())]
    parts += [Paragraph(line, warning=True) for line in shortened(findings)]
    return Section("Data", parts)


def _plan(project: Project) -> Section:
    if not project.plans_path.is_file():
        return Section("Plan", ())
    rows = []
    for name, stages in project.plans()["diffseg"]["configurations"].items():
        for stage in ("pretraining", "training"):
            if stage in stages:
                planned = stages[stage]
                patch = " × ".join(map(str, planned["patch_size"]))
                measured = planned.get("measured", {}).get("reserved_gib")
                cells = [name, stage, patch, str(planned["batch_size"]), f"{planned['predicted_peak_gib']:.2f}"]
                rows.append([*cells, "–" if measured is None else f"{measured:.2f}"])
    header = ["configuration", "stage", "patch", "batch", "predicted GiB", "measured GiB"]
    decisions = [[each.scope, each.what, each.text, each.why] for each in explained(project)]
    return Section(
        "Plan",
        (
            Table("Patch and batch of both stages, and the peak memory of a step", header, rows),
            Table("Every decision, and why", ["of", "what", "value", "why"], decisions, folded=True),
        ),
    )


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = []
    for name, stage in sorted(stages.items(), key=lambda item: item[1]["start"]):
        finished = stage["status"] == "finished"
        rows.append(
            [
                name,
                "finished" if finished else "not finished",
                stage["start"][:19].replace("T", " "),
                _duration(stage["seconds"]) if finished else "–",
                f"{stage['peak_rss_gib']:.2f}" if finished else "–",
                str(stage["settings"].get("seed", "")),
            ]
        )
    header = ["stage", "state", "begun (UTC)", "took", "peak memory, GiB", "seed"]
    return Section("Stages", (Table("As they were run; those of other settings are set aside", header, rows),))


def _pretrainings(project: Project, stages: Mapping[str, Mapping[str, Any]]) -> Section:
    parts: list[Part] = []
    for name, stage in stages.items():
        match = _PRETRAINING.fullmatch(name)
        if match is None or stage["status"] != "finished":
            continue
        where = f"{match['configuration']}, fold {match['fold']}"
        for dataset, cases in stage["outputs"].get("cases_seen", {}).items():
            parts.append(Paragraph(f"{where}: it has seen {len(cases)} case(s) of {dataset}: {listed(cases, 20)}."))
        folder = project.model_folder("pretrain", match["configuration"]) / f"fold_{match['fold']}"
        parts += _curves(folder, where)
    return Section("Pretraining", parts)


def _curves(folder: Path, of: str) -> Iterator[Picture]:
    if (folder / _CURVES).is_file():
        yield Picture(f"Learning curves: {of}", (folder / _CURVES).read_bytes(), folded=True)


def _fold(project: Project, stages: Mapping[str, Mapping[str, Any]], trained: TrainedFold, pictured: int) -> Section:
    folder = project.model_folder(trained.trainer, trained.configuration) / f"fold_{trained.fold}"
    settings = stages[trained.stage]["settings"]
    length = f"{settings['iterations']} iterations, seed {settings['seed']}, {settings['optimizer']}"
    parts: list[Part] = [Paragraph(f"{length}.")]
    if trained.fold == "all":
        parts.append(Paragraph("Trained on all cases: scores would be of cases that it has seen, and are left out."))
    else:
        try:
            parts += _scores(project, trained, folder, pictured)
        except BadInputError as error:
            parts.append(Paragraph(f"Not scored: {error}", warning=True))
    parts += _curves(folder, trained.title)
    return Section(trained.title, parts)


def _scores(project: Project, trained: TrainedFold, folder: Path, pictured: int) -> Iterator[Part]:
    if not (folder / FINAL).is_file():
        yield Paragraph(f"{folder / FINAL} is no longer there.", warning=True)
        return
    evaluation = evaluate_validation(project, trained.trainer, trained.configuration, trained.fold)
    if evaluation is None:
        yield Paragraph(str(not_scorable(project)), warning=True)
        return
    yield from score_parts(evaluation)
    yield from _pictures(project, folder, evaluation, pictured)


def _pictures(project: Project, folder: Path, evaluation: Evaluation, most: int) -> Iterator[Part]:
    """The worst cases: image, reference, prediction."""
    cases = {case.identifier: case for case in project.raw().labelled_cases()}
    labels = project.dataset_json()["labels"]
    for worst in evaluation.worst_cases[:most]:
        title = f"{worst.case}: mean DSC {worst.dsc:.3f}, {worst.structure} {worst.structure_dsc:.3f}"
        if worst.case not in cases:
            yield Paragraph(f"{title}; it is no longer in {project.raw().folder}, and cannot be shown.", warning=True)
            continue
        try:
            yield _picture(cases[worst.case], folder / "validation", labels, title)
        except (ValueError, UnreadableVolumeError) as error:
            yield Paragraph(f"{title}; it cannot be shown: {error}", warning=True)


def _picture(case: Case, predictions: Path, labels: Mapping[str, Any], title: str) -> Picture:
    import SimpleITK as sitk

    from diffseg_nnunet.report.pictures import overlay_png

    image = read_volume(case.images[0])
    reference, prediction = read_volume(case.label), read_volume(predictions / case.label.name)
    arrays = [sitk.GetArrayFromImage(volume) for volume in (image, reference, prediction)]
    with TemporaryDirectory(prefix="diffseg_report_") as temporary:
        path = Path(temporary) / "case.png"
        overlay_png(path, *arrays, labels, image.GetSpacing()[::-1], title)
        return Picture(title, path.read_bytes())


def _selection(stages: Mapping[str, Mapping[str, Any]]) -> Section:
    """What is predicted with, by the validation cases."""
    parts: list[Part] = []
    for name, stage in stages.items():
        if not name.startswith("select/") or stage["status"] != "finished":
            continue
        outputs = stage["outputs"]
        if "comparisons" in outputs:
            kept = ", ".join(outputs["structures"]) or "no structure"
            rows = [_compared(Comparison(**each)) for each in outputs["comparisons"]]
            header = ["structure", "DSC", "refined", "gain", "p (Holm)", "cases"]
            parts.append(Table(f"{name}: the refiner is used for {kept}", header, rows))
        else:
            chosen = " + ".join(outputs["configurations"])
            parts.append(
                Paragraph(
                    f"{name}: {chosen}, mean DSC {outputs['dsc_before']:.4f}, after nnU-Net's postprocessing "
                    f"{outputs['dsc_after']:.4f}."
                )
            )
    return Section("Selection", parts)


def _compared(each: Comparison) -> list[str]:
    interval = "" if each.gain_low is None else f" [{each.gain_low:+.4f}, {each.gain_high:+.4f}]"
    p = "–" if each.p_holm is None else f"{each.p_holm:.2g}"
    return [
        each.structure,
        f"{each.before:.4f}",
        f"{each.after:.4f}",
        f"{each.gain:+.4f}{interval}",
        p,
        str(each.cases),
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
