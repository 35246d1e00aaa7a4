"""``diffseg preprocess``."""

from __future__ import annotations

from diffseg_nnunet.cli.arguments import Configurations, DatasetId, Workspace
from diffseg_nnunet.cli.console import open_project


def preprocess(dataset_id: DatasetId, configuration: Configurations = None, workspace: Workspace = None) -> None:
    """Preprocess labelled and unlabelled images by the plan, for all configurations or those given. Resumes."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.pipeline.preprocessing import preprocess as preprocess_stage

        chosen = configuration or list(project.plans()["configurations"])
        preprocess_stage(project, chosen)
        for name in chosen:
            pool = sum(len(list(path.glob("*.pkl"))) for path in project.unlabelled_folder(name).glob("*"))
            labelled = len(project.labelled_preprocessed(name))
            project.reporter.info(f"{name}: {labelled} labelled and {pool} unlabelled cases preprocessed")
