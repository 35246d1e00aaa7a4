"""``diffseg verify``."""

from __future__ import annotations

from diffseg_nnunet.cli.arguments import DatasetId, Workspace
from diffseg_nnunet.cli.console import open_project


def verify(dataset_id: DatasetId, workspace: Workspace = None) -> None:
    """Check every image and label of a data set, and nnU-Net's own integrity check; say what to mend."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.pipeline.planning import verify as verify_stage

        for finding in verify_stage(project):
            project.reporter.warn(str(finding))
        raw = project.raw()
        project.reporter.info(
            f"{raw.name}: {len(raw.labelled_cases())} labelled, {len(raw.unlabelled_cases())} unlabelled, "
            f"{len(raw.test_cases())} test cases, no errors"
        )
