"""KiTS19, KiTS21 and KiTS23: kidneys, tumours and cysts in CT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import listed

from .converter import Option, TreeConverter
from .description import BACKGROUND, ConversionPlan, SourceCase
from .layouts import Found, FoundPart, Layout, Part, find

RELEASES = ("19", "21", "23")
# numbers of KiTS19's test cases, whose labels were never published (github.com/neheller/kits19); KiTS21 labelled them
HIDDEN_IN_19 = range(210, 300)
# KiTS23's training cases are 0 to 299 and 400 to 588 (kits23/__init__.py)
FIRST_ONLY_IN_23 = 400


class KiTSConverter(TreeConverter):
    """The three releases lie in the same tree; what else lies in it tells which one it is."""

    format_name = "kits"
    title = "KiTS19, KiTS21 or KiTS23: kidneys, tumours and (from 2021 on) cysts in CT"
    expects = """\
data/ or dataset/                any name
    case_00000/
        imaging.nii.gz           fetched by the repository's own download script
        segmentation.nii.gz      of KiTS21 also aggregated_MAJ_seg.nii.gz; KiTS19 has none for 210 to 299
        instances/               of KiTS21 and KiTS23; not read
    kits.json, kits23.json       not read"""
    licence = "CC BY-NC-SA 4.0"
    citation = (
        "Heller et al., The KiTS21 Challenge (arXiv 2307.01984); of KiTS19: Medical Image Analysis 67, 101821 (2021)"
    )
    options = (Option("release", "19, 21 or 23, where it cannot be seen from the files."),)
    dataset_name = "KiTS"
    labels: ClassVar[dict[str, int]] = {"kidney": 1, "tumor": 2, "cyst": 3}
    layouts = (
        Layout("KiTS", (Part("training", ("{case}/imaging",), "{case}/segmentation"),), case=r"case_\d{5}"),
        # the majority vote of the three annotators was the reference of the challenge
        Layout("KiTS21", (Part("training", ("{case}/imaging",), "{case}/aggregated_MAJ_seg"),), case=r"case_\d{5}"),
    )
    certainty = 1.0

    def find(self, source: Path | None) -> Found:
        try:
            return super().find(source)
        except BadInputError:
            labels = Layout("", (Part("training", ("{case}/segmentation",)),), case=r"case_\d{5}")
            if source is not None and source.is_dir() and (found := find(source, (labels,))):
                raise BadInputError(
                    f"{found.root} has segmentations, but no imaging.nii.gz: the repository holds the labels only.",
                    "Fetch the images with the repository's download script, then convert again.",
                ) from None
            raise

    def cases(self, found: FoundPart) -> list[SourceCase]:
        hidden = {case: files for case, files in found.images.items() if _is_hidden(case, found)}
        labelled = {case: files for case, files in found.images.items() if case not in hidden}
        return [
            *super().cases(replace(found, images=labelled)),
            *super().cases(FoundPart(replace(found.part, role="test"), hidden, {})),
        ]

    def adapted(self, plan: ConversionPlan, found: Found, release: str | None = None, **_: Any) -> ConversionPlan:
        if release not in (None, *RELEASES):
            raise BadInputError(f"There is no release '{release}' of KiTS.", "Choose 19, 21 or 23 with --release.")
        seen, reason = _release(plan, found)
        release = release or seen
        unlabelled = [case.identifier for case in plan.cases if case.label is None]
        if release != "19" and unlabelled:
            raise BadInputError(
                f"{len(unlabelled)} case(s) have no label, but KiTS{release} has one for each: {listed(unlabelled)}.",
                "Download them again; if this is KiTS19, give --release 19.",
            )
        names = {BACKGROUND: 0, **self.labels}
        if release == "19":
            del names["cyst"]
        note = f"Taken for KiTS{release}{'' if release != seen else f' ({reason})'}: labels {listed(list(names)[1:])}."
        name = f"KiTS{release}" if plan.name == self.dataset_name else plan.name
        return replace(plan, name=name, labels=names, source_labels=names, notes=(*plan.notes, note))


def _is_hidden(case: str, found: FoundPart) -> bool:
    return case not in found.labels and int(case.removeprefix("case_")) in HIDDEN_IN_19


def _release(plan: ConversionPlan, found: Found) -> tuple[str, str]:
    """The release, and what it was seen from."""
    numbers = [int(case.identifier.removeprefix("case_")) for case in plan.cases]
    labelled = [int(case.identifier.removeprefix("case_")) for case in plan.cases if case.label is not None]
    folders = [found.root / case.identifier for case in plan.cases]
    if (found.root / "kits23.json").is_file() or max(numbers) >= FIRST_ONLY_IN_23:
        return "23", "it has a kits23.json, or a case that only KiTS23 has"
    if found.layout.name == "KiTS21" or any((folder / "segmentations").is_dir() for folder in folders):
        return "21", "it has the segmentations of several annotators"
    if any((folder / "instances").is_dir() for folder in folders):
        return "23", "its cases have a folder 'instances', and there are no votes as in KiTS21"
    if any(number in HIDDEN_IN_19 for number in labelled):
        return "21", "it has labels that KiTS19 keeps hidden"
    return "19", "it has nothing that only the later releases have; if it is one of them, give --release"
