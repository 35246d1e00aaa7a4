"""What a converter is: a description of a format, and a plan made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import listed

from .description import BACKGROUND, ConversionPlan, SourceCase, SplitScheme
from .layouts import Found, FoundPart, Layout, find
from .sources import VolumeFile


@dataclass(frozen=True)
class Option:
    """An option of a converter's command, handed to its `plan` under its name.

    Attributes:
        name: of the keyword argument; ``pseudo_labels`` becomes ``--pseudo-labels``.
        help: one sentence.
        kind: str, int, Path, or bool (a flag).
        required: it must be given.
        many: it may be repeated; the argument is a tuple.
    """

    name: str
    help: str
    kind: type = str
    required: bool = False
    many: bool = False


@dataclass(frozen=True)
class Recognition:
    """Why a folder is believed to be of a format.

    Attributes:
        format_name: the converter's.
        reason: what was found, one clause.
        certainty: 0 to 1; file names that only this format has give 1.
        options: arguments that `plan` needs beside the source, as `diffseg convert auto` gives them.
    """

    format_name: str
    reason: str
    certainty: float
    options: dict[str, Any]


class Converter(ABC):
    """A format. Subclasses are found by their entry point in the group ``diffseg_nnunet.converters``.

    Attributes:
        format_name: the name of its command.
        title: what the data set is, one line.
        expects: the tree it reads, as shown to users.
        licence: of the data, as its publishers state it.
        citation: what to cite.
        options: further options of its command.
        needs_source: whether its command must be given SRC; else `plan` may get None.
    """

    format_name: ClassVar[str]
    title: ClassVar[str]
    expects: ClassVar[str]
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    needs_source: ClassVar[bool] = True

    @abstractmethod
    def plan(self, source: Path | None, *, name: str | None = None, **options: Any) -> ConversionPlan:
        """List the cases; reads names and small text files, no voxel, and writes nothing.

        Args:
            source: the extracted download.
            name: name of the data set; None: the format's.
            options: those declared in `options`; one that was not given is None (or False, or empty).

        Raises:
            BadInputError: this is no such download; the message shows the tree that is expected.
        """

    def recognise(self, source: Path) -> Recognition | None:
        """Whether the folder looks like this format; None where it does not."""
        return None


class TreeConverter(Converter):
    """A converter that is all description: labels, channels, layouts, splits.

    Attributes:
        dataset_name: of the data set, unless the user gives another.
        channel_names: of its images.
        labels: name -> value as in the label files; without the background.
        layouts: the forms it is handed around in.
        certainty: of `recognise`; 1 where only this data set has files of such names.
    """

    dataset_name: ClassVar[str]
    channel_names: ClassVar[tuple[str, ...]] = ("CT",)
    labels: ClassVar[dict[str, int]]
    layouts: ClassVar[tuple[Layout, ...]]
    certainty: ClassVar[float] = 0.9

    def plan(self, source: Path | None, *, name: str | None = None, **options: Any) -> ConversionPlan:
        found = self.find(source)
        values = {BACKGROUND: 0, **self.labels}
        # nnU-Net wants 0, 1, 2, ...; a source with gaps is renumbered in the order of its values
        ordered = sorted(values, key=values.__getitem__)
        plan = ConversionPlan(
            name=name or self.dataset_name,
            channel_names=dict(enumerate(self.channel_names)),
            labels={label: value for value, label in enumerate(ordered)},
            cases=tuple(case for part in found.parts for case in self.cases(part)),
            source_labels=values,
            extra=described(self),
            notes=tuple(self._notes(source, found)),
        )
        plan = self.adapted(plan, found, **options)
        return replace(plan, splits=self.splits(plan))

    def find(self, source: Path | None) -> Found:
        """The layout of this format that fits.

        Raises:
            BadInputError: none does.
        """
        from .folder import require_folder

        source = require_folder(source, self.expects)
        found = find(source, self.layouts)
        if found is None:
            raise BadInputError(f"{source} does not look like {self.title}.", f"Expected is\n{self.expects}")
        return found

    def cases(self, found: FoundPart) -> list[SourceCase]:
        """The cases of one part; a hook for formats whose labels or roles depend on the case."""
        part = found.part
        missing = [case for case, channels in found.images.items() if None in channels]
        if missing:
            raise BadInputError(
                f"{len(missing)} case(s) lack one of their {len(part.images)} channels: {listed(missing)}.",
                "Download them again, or remove what is left of these cases.",
            )
        if part.role == "training":
            self._refuse_unpaired(found)
        return [
            SourceCase(
                part.identifier.replace("{case}", case.replace("/", "_")),
                tuple(VolumeFile(path) for path in channels),
                VolumeFile(found.labels[case]) if case in found.labels else None,
                part.role,
            )
            for case, channels in found.images.items()
        ]

    def adapted(self, plan: ConversionPlan, found: Found, **options: Any) -> ConversionPlan:
        """The plan as the command's options, or what else lies beside the images, want it; a hook."""
        return plan

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        """The published divisions that these cases allow; the first is the default."""
        return ()

    def recognise(self, source: Path) -> Recognition | None:
        found = find(source, self.layouts)
        if found is None:
            return None
        files = sum(len(part.images) for part in found.parts)
        where = "" if found.root == source else f" in {found.root}"
        return Recognition(
            self.format_name, f"{files} image(s) are named as in {found.layout.name}{where}", self.certainty, {}
        )

    def _refuse_unpaired(self, found: FoundPart) -> None:
        lonely_images = [str(found.images[case][0]) for case in found.images if case not in found.labels]
        lonely_labels = [str(found.labels[case]) for case in found.labels if case not in found.images]
        for files, lacks in ((lonely_images, "label"), (lonely_labels, "image")):
            if files:
                raise BadInputError(
                    f"{len(files)} file(s) have no {lacks}: {listed(files)}.",
                    f"Is the download whole? Expected is\n{self.expects}",
                )

    def _notes(self, source: Path, found: Found) -> list[str]:
        notes = [f"Recognised {found.layout.name} in {found.root}."]
        notes += [
            f"{len(part.images)} {part.part.role} image(s) found as {part.part.images[0]}, "
            f"a whole download has {part.part.expected}."
            for part in found.parts
            if part.part.expected not in (None, len(part.images))
        ]
        return notes


def described(converter: type[Converter] | Converter) -> dict[str, Any]:
    """The entries of dataset.json that say where the data come from."""
    entries = {"description": converter.title, "licence": converter.licence, "citation": converter.citation}
    return {key: value for key, value in entries.items() if value} | {"converted_from": converter.format_name}
