"""``diffseg verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import DatasetId, Workspace
from diffseg_nnunet.cli.console import open_project

if TYPE_CHECKING:
    from rich.table import Table

    from diffseg_nnunet.verification import CaseRecord, Finding

EXIT_WARNINGS = 1
_ROWS_A_KIND = 5
_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write findings and case records as JSON.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the findings as CSV, a row each.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for both: findings.json, findings.csv.")]


def verify(
    dataset_id: DatasetId,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    output: Output = None,
    workspace: Workspace = None,
) -> None:
    """Check every image and label of a data set, and nnU-Net's own integrity check; say what to mend.

    Exit codes: 0 nothing to mend, 1 warnings only, 2 errors.
    """
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.atomic import write_json, write_text
        from diffseg_nnunet.errors import BadInputError
        from diffseg_nnunet.pipeline.verifying import VerificationError, examined
        from diffseg_nnunet.pipeline.verifying import verify as verify_stage
        from diffseg_nnunet.verification import of_severity
        from diffseg_nnunet.verification.export import findings_csv, findings_json

        records: Sequence[CaseRecord]
        try:
            findings = verify_stage(project)
            records = examined(project).records
        except VerificationError as error:
            findings, records = error.findings, error.records
        for path in filter(None, (json_file, output and output / "findings.json")):
            write_json(path, findings_json(project.name, findings, records))
            project.reporter.info(f"findings: {path}")
        for path in filter(None, (csv_file, output and output / "findings.csv")):
            write_text(path, findings_csv(findings))
            project.reporter.info(f"findings: {path}")
        if findings:
            # cells are to be wrapped, lines of news are not
            project.reporter.console.print(findings_table(project.name, findings), soft_wrap=False)
        raw = project.raw()
        errors, warnings = of_severity(findings, "error"), of_severity(findings, "warning")
        if errors:
            raise BadInputError(
                f"{project.name} has {len(errors)} error(s) and {len(warnings)} warning(s), listed above.",
                f"Mend them, or remove the cases, then run `diffseg verify {project.id}` again; it reads what is new.",
            )
        project.reporter.info(
            f"{raw.name}: {len(raw.labelled_cases())} labelled, {len(raw.unlabelled_cases())} unlabelled, "
            f"{len(raw.test_cases())} test cases, {f'{len(warnings)} warning(s), ' if warnings else ''}no errors"
        )
        if warnings:
            raise typer.Exit(EXIT_WARNINGS)


def findings_table(dataset: str, findings: Sequence[Finding]) -> Table:
    """A row for each finding, the gravest first; of each kind the first few, and how many are like them."""
    from rich.table import Table
    from rich.text import Text

    from diffseg_nnunet.verification import grouped

    table = Table("", "code", "case", "what", "mend", title=f"{dataset}: what to mend or to know", show_lines=True)
    for column in (table.columns[1], table.columns[2]):
        column.overflow = "fold"
    for group in grouped(findings):
        style = _STYLES[group[0].severity]
        for finding in group[:_ROWS_A_KIND]:
            row = (finding.code, finding.case or "–", finding.message, finding.mend)
            # names of labels and files may hold what rich takes for markup
            table.add_row(Text(finding.severity, style=style), *map(Text, row))
        if len(group) > _ROWS_A_KIND:
            more = f"{len(group) - _ROWS_A_KIND} more of this kind: --csv FILE lists all"
            table.add_row(Text(group[0].severity, style=style), group[0].code, "…", more, "")
    return table
