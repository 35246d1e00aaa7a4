"""What the commands of ``diffseg convert`` do once their options are parsed: plan, choose, write, and tell."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffseg_nnunet.cli.console import ConsoleReporter
from diffseg_nnunet.cli.conversion_options import flag
from diffseg_nnunet.dataset_conversion import archives, recognition, selection
from diffseg_nnunet.dataset_conversion.core import ConversionRefusedError, ConversionReport
from diffseg_nnunet.dataset_conversion.preview import preview
from diffseg_nnunet.dataset_conversion.report import described_plan, write_report
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.verification import grouped, listed
from diffseg_nnunet.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from diffseg_nnunet.dataset_conversion.converter import Converter
    from diffseg_nnunet.dataset_conversion.description import ConversionPlan
    from diffseg_nnunet.verification import Finding

_LABELS, _CASES = "--keep-labels", "--cases"


@dataclass(frozen=True)
class Request:
    """The options that all formats have, as they were given."""

    dataset_id: int
    name: str | None = None
    workspace: Path | None = None
    copy: bool = False
    dry_run: bool = False
    keep_labels: str | None = None
    cases: str | None = None
    splits: str | None = None
    skip_bad: bool = False
    no_repair: bool = False
    no_verify: bool = False
    report: Path | None = None
    extract: bool = False
    yes: bool = False

    def as_arguments(self) -> list[str]:
        """The same on a command line."""
        return _arguments({"id": self.dataset_id, **{k: v for k, v in vars(self).items() if k != "dataset_id"}})


def convert(converter: Converter, source: Path | None, options: Mapping[str, Any], request: Request) -> None:
    """Convert a download whose format is known.

    Raises:
        BadInputError: it is refused.
        typer.Exit: with code 1, where there is something to look at.
    """
    reporter = ConsoleReporter()
    if request.report is not None:
        _refuse_unwritable(request.report)
    if source is not None and (source := _folder_of(source, request, reporter)) is None:
        return
    with _archives_named(source):
        plan = converter.plan(source, name=request.name, **options)
    labels = selection.names_given(request.keep_labels, _LABELS) if request.keep_labels is not None else ()
    cases = selection.names_given(request.cases, _CASES) if request.cases is not None else ()
    plan = selection.prepared(plan, labels=labels, cases=cases, splits=request.splits)
    if request.dry_run:
        _print_preview(plan, request, reporter)
        return
    record = {
        "format": converter.format_name,
        "source": source.resolve().name if source is not None else None,
        # names say enough: whole paths are of no use on another machine
        "options": {key: _json_value(value) for key, value in options.items() if value},
        "selection": {"labels": list(labels), "cases": list(cases), "splits": request.splits},
    }
    with reporter.live():
        report = _execute(plan, request, record, reporter)
    _print_report(report, request, reporter)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def convert_automatically(source: Path, request: Request) -> None:
    """Convert a download as the format that recognises it, once the user has agreed.

    Raises:
        BadInputError: none recognises it, or two equally well; or nobody can be asked, and --yes is not given: the
            message has the command that converts it.
    """
    reporter = ConsoleReporter()
    if (folder := _folder_of(source, request, reporter)) is None:
        return
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", "Give the folder of the download.")
    found, unusable = recognition.recognised(folder)
    for each in unusable:
        reporter.warn(f"the format '{each.name}' could not be asked: {each.reason}")
    for each in found:
        reporter.info(f"{each.format_name}: {each.reason} (certainty {each.certainty:g})")
    with _archives_named(folder):
        chosen = recognition.best(folder, found)
    converter = recognition.load(chosen.format_name)
    missing = [option.name for option in converter.options if option.required and option.name not in chosen.options]
    options = {option.name: option.kind() if option.kind is bool else None for option in converter.options}
    options |= {option.name: () for option in converter.options if option.many} | dict(chosen.options)
    words = ["diffseg", "convert", chosen.format_name, str(source)]
    words += [*_arguments(chosen.options), *request.as_arguments()]
    command = " ".join([shlex.join(words), *(f"{flag(name)} …" for name in missing)])
    if missing:
        raise BadInputError(f"{folder} is probably of the format '{chosen.format_name}'.", f"Run `{command}`.")
    if not (request.yes or request.dry_run):
        if not sys.stdin.isatty():
            raise BadInputError(
                f"{folder} is of the format '{chosen.format_name}', which nobody has confirmed.",
                f"Run `{command}`, or add --yes.",
            )
        typer.confirm(f"Convert it as '{chosen.format_name}'?", abort=True)
    convert(converter, folder, options, request)


def print_formats() -> None:
    """Every format: what it is, its licence, and the tree it expects."""
    reporter = ConsoleReporter()
    for converter in recognition.converters():
        if isinstance(converter, recognition.Unusable):
            reporter.warn(f"{converter.name} cannot be used: {converter.reason}\n")
            continue
        reporter.console.print(converter.format_name, style="bold", end="", markup=False)
        reporter.info(f": {converter.title}")
        if converter.licence:
            reporter.info(f"  licence: {converter.licence}")
        reporter.info("\n".join(f"    {line}" for line in converter.expects.splitlines()) + "\n")


def _refuse_unwritable(report: Path) -> None:
    """A report that cannot be written is to be known before hours of work, and must not hide what they found."""
    existing = next(folder for folder in (report.absolute(), *report.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInputError(f"--report {report} cannot be a folder to write into.", "Choose another.")


@contextmanager
def _archives_named(source: Path | None) -> Iterator[None]:
    """Where a folder is refused, archives in it are the likeliest reason."""
    try:
        yield
    except BadInputError as error:
        packed = archives.archives_in(source) if source is not None else []
        if not packed:
            raise
        shown = listed(path.relative_to(source) for path in packed)
        raise BadInputError(
            f"{error.message} It holds archives: {shown}.",
            f"Extract them where they are, if they are parts of it. {error.mend or ''}".rstrip(),
        ) from error


def _execute(
    plan: ConversionPlan, request: Request, record: Mapping[str, Any], reporter: ConsoleReporter
) -> ConversionReport:
    location = Workspace.locate(request.workspace)
    if (overruled := location.overruled(request.workspace)) is not None:
        reporter.warn(overruled)
    try:
        report = plan.execute(
            dataset_id=request.dataset_id,
            workspace=location,
            copy=request.copy,
            verify=not request.no_verify,
            repair=not request.no_repair,
            skip_bad=request.skip_bad,
            workers=worker_count(),
            progress=lambda done, total: reporter.progress("convert", done, total),
            record=record,
        )
    except ConversionRefusedError as error:
        if request.report is not None:
            write_report(request.report, {**record, **described_plan(plan), "refused": True}, error.findings)
        raise
    if request.report is not None:
        write_report(request.report, report.as_json(record), report.findings)
    return report


def _folder_of(source: Path, request: Request, reporter: ConsoleReporter) -> Path | None:
    """The source, unpacked where it is an archive; None where that would have to be done, but nothing may be written.

    Raises:
        BadInputError: it is an archive, and --extract is not given.
    """
    if not archives.is_archive(source):
        return source
    target = archives.extracted_folder(source)
    size = archives.gib(archives.unpacked_bytes(source))
    if not request.extract:
        raise BadInputError(
            f"{source} is an archive ({size} unpacked); extract it first.",
            f"Add --extract to have it unpacked into {target}.",
        )
    news = f"{source.name}: {size} unpacked, into {target}"
    reporter.info(news)
    if request.dry_run and not target.is_dir():
        reporter.info("dry run: nothing was unpacked, so that nothing is known of its content")
        return None
    if sys.stdin.isatty() and not request.yes and not target.is_dir():
        typer.confirm("Unpack it?", default=True, abort=True)
    with reporter.live():
        return archives.extract(source, lambda done, total: reporter.progress("extract", done, total))


def _print_preview(plan: ConversionPlan, request: Request, reporter: ConsoleReporter) -> None:
    location = Workspace.locate(request.workspace)
    told = preview(plan, dataset_id=request.dataset_id, workspace=location, copy=request.copy)
    reporter.info(f"dry run: {told.folder} would be written")
    reporter.info(f"cases: {_counted(told.cases)}")
    reporter.info(f"files: {_counted(told.files)}, about {told.needed / 1024**2:,.1f} MiB to write")
    _print_labels(plan, reporter)
    _print_splits(plan, reporter)
    for note in plan.notes:
        reporter.info(note)


def _print_report(report: ConversionReport, request: Request, reporter: ConsoleReporter) -> None:
    reporter.info(f"{report.folder}: {_counted(report.cases)} case(s); files: {_counted(report.files)}")
    _print_splits(report.plan, reporter)
    for note in report.notes:
        reporter.info(note)
    if report.skipped:
        reporter.warn(f"{len(report.skipped)} case(s) with errors were left out: {', '.join(report.skipped)}")
    if report.findings:
        reporter.console.print(_findings_table(report.findings))
        reporter.info(f"all of them: {report.folder / 'conversion.csv'}")
    if request.no_verify:
        reporter.info(f"nothing was read: run {_command('verify', request)}")
    reporter.info(f"next: {_command('run', request)}")


def _command(name: str, request: Request) -> str:
    """A command on the new data set, as it is to be typed."""
    return shlex.join(["diffseg", name, str(request.dataset_id), *_arguments({"workspace": request.workspace})])


def _print_labels(plan: ConversionPlan, reporter: ConsoleReporter) -> None:
    from rich.table import Table

    rows = selection.label_table(plan)
    if not rows:
        return
    table = Table("value in the source", "name", "new value", "new name", title="labels")
    for value, name, new, new_name in rows:
        table.add_row(str(value), name, str(new), new_name)
    reporter.console.print(table)


def _print_splits(plan: ConversionPlan, reporter: ConsoleReporter) -> None:
    if not plan.splits:
        return
    first, *others = plan.splits
    more = f"; others: {', '.join(scheme.name for scheme in others)}" if others else ""
    reporter.info(f"splits: {first.name}, {len(first.folds)} fold(s) ({first.source}){more}")


def _findings_table(findings: Iterable[Finding]) -> Any:
    """One row a kind of finding: how many cases, and the first of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table("severity", "finding", "cases", "for example")
    for group in grouped(findings):
        first, cases = group[0], len({finding.case for finding in group} - {""})
        table.add_row(first.severity, first.code, str(cases or "all"), Text(str(first), overflow="fold"))
    return table


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    return [_json_value(each) for each in value] if isinstance(value, tuple) else value


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Options and their values as on a command line; flags that are off, and what is empty, left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(flag(name))
        elif value not in (None, False, ()):
            for each in value if isinstance(value, tuple | list) else (value,):
                words += [flag(name), str(each)]
    return words
