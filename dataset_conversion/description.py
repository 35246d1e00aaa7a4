"""What is to be written, as data: made by a converter from names alone, changed by the user, then executed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .core import ConversionReport
    from .sources import VolumeSource

Role = Literal["training", "unlabelled", "test"]
BACKGROUND, IGNORE = "background", "ignore"


@dataclass(frozen=True)
class SourceCase:
    """One scan as it lies in the source.

    Attributes:
        identifier: the name it gets, and keeps through all stages.
        images: one source a channel, in channel order.
        label: its segmentation; a training case must have one, a test case may, an unlabelled one has none.
        role: decides between imagesTr, imagesUn and imagesTs.
        source_labels: name -> value in this label, where it differs from the plan's.
        unannotated: names of structures that nobody looked for in this case: they may hide in its background, which
            therefore becomes nnU-Net's ignore label.
        patient: whom it shows, by whatever name tells him from others, where the source tells; it is not written, only
            which cases share it.
    """

    identifier: str
    images: tuple[VolumeSource, ...]
    label: VolumeSource | None
    role: Role
    source_labels: Mapping[str, int] | None = None
    unannotated: tuple[str, ...] = ()
    patient: str | None = None

    @property
    def sources(self) -> tuple[VolumeSource, ...]:
        """The images, then the label where there is one."""
        return (*self.images, *([] if self.label is None else [self.label]))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of images and label, each once."""
        return tuple(dict.fromkeys(path for source in self.sources for path in source.files))


@dataclass(frozen=True)
class SplitScheme:
    """A published or chosen way to divide the training cases, as nnU-Net's splits_final.json has it.

    Attributes:
        name: as given to --splits, e.g. "18/12".
        folds: one {"train": [...], "val": [...]} of case identifiers a fold.
        source: who published it.
    """

    name: str
    folds: tuple[Mapping[str, tuple[str, ...]], ...]
    source: str


@dataclass(frozen=True)
class ConversionPlan:
    """Everything the engine needs to know.

    Attributes:
        name: the data set's name, without ``DatasetXXX_``.
        channel_names: channel number -> name; 'CT' makes nnU-Net use its CT normalisation.
        labels: name -> value as it will be written, 'background' being 0, the values 0, 1, 2, ...; 'ignore', where
            there is one, the highest.
        cases: in any order.
        source_labels: name -> value in the source's label files; None: the values of `labels`. Names that `labels`
            lacks become background. Values that are not named here are refused.
        renamed: name in the source -> name in `labels`, where they differ; several may become one.
        extra: further entries of dataset.json (description, licence, reference, ...).
        notes: what the user should know about the source, one sentence each.
        splits: the schemes that can be chosen by name; the first one is written unless another is asked for.
    """

    name: str
    channel_names: dict[int, str]
    labels: dict[str, int]
    cases: tuple[SourceCase, ...]
    source_labels: Mapping[str, int] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    splits: tuple[SplitScheme, ...] = ()

    @property
    def same_patient(self) -> list[list[str]]:
        """The cases of each patient who has several, sorted."""
        cases: dict[str, list[str]] = defaultdict(list)
        for case in self.cases:
            if case.patient:
                cases[case.patient].append(case.identifier)
        return sorted(sorted(group) for group in cases.values() if len(group) > 1)

    def values(self, case: SourceCase) -> dict[int, int]:
        """Value in a case's label file -> value to write."""
        named = case.source_labels or self.source_labels or self.labels
        values = {value: self.labels.get(self.renamed.get(name, name), 0) for name, value in named.items()}
        values.setdefault(0, 0)
        if case.unannotated:
            values[0] = self.labels[IGNORE]
        return values

    def execute(self, **options: Any) -> ConversionReport:
        """Write the data set: :func:`core.convert` of this plan, for callers that found the converter by name."""
        from .core import convert

        return convert(self, **options)
