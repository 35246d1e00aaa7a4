"""Run a benchmark by the pipeline's own stages: resumable, nothing twice, one failure no reason to stop."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from diffseg_nnunet.atomic import DISK_FULL, write_json, write_text
from diffseg_nnunet.benchmarking.curves import LearningCurve
from diffseg_nnunet.benchmarking.divisions import Division, divisions, ensure_fold
from diffseg_nnunet.benchmarking.protocol import TWIN, BenchmarkProtocol
from diffseg_nnunet.benchmarking.provenance import Pool, recorded_pool, refuse_copies, refuse_seen
from diffseg_nnunet.benchmarking.runs import (
    Run,
    RunRecord,
    State,
    fold_numbers,
    list_runs,
    run_signature,
    set_aside_other,
    state_of,
)
from diffseg_nnunet.budgets.folds import BudgetFold
from diffseg_nnunet.errors import BadInputError, DiffSegError
from diffseg_nnunet.evaluation.labels import read_label_names
from diffseg_nnunet.evaluation.protocols import find_protocol
from diffseg_nnunet.evaluation.report import SCORES_JSON
from diffseg_nnunet.evaluation.structures import match_structures
from diffseg_nnunet.pipeline import manifest, planning, preprocessing, stages
from diffseg_nnunet.pipeline.device import prepare_device, release_memory
from diffseg_nnunet.pipeline.evaluating import evaluate, not_scorable
from diffseg_nnunet.pipeline.label_budgets import draw_budget
from diffseg_nnunet.pipeline.planning import PlanRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.records import read_record
from diffseg_nnunet.pipeline.starting import is_planned_source, learnt_in_training, refuse_misfit
from diffseg_nnunet.pipeline.verifying import is_verified, verify
from diffseg_nnunet.planning.gpus import resolve_device
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.raw_dataset import DATASET_JSON, SPLITS_FILE
from diffseg_nnunet.registry import load as load_registered
from diffseg_nnunet.training.checkpoint import file_digest, load_safely
from diffseg_nnunet.training.schedules import split_iterations
from diffseg_nnunet.training.settings import PretrainingSettings, TrainingSettings
from diffseg_nnunet.verification import listed

TRACEBACK, PLAN, NETWORKS = "traceback.txt", "plan.json", "networks"
_PREPARED = ("verify", "plan", "preprocess")
T = TypeVar("T")


@dataclass
class Pretrainings:
    """The pretrained networks of the base folds, each made when it is first asked for.

    Attributes:
        checkpoints: base fold -> its network.
        seen: base fold -> what it has seen, of those that were made or found; None: its checkpoint does not say.
        failed: base fold -> why it could not be made; it is not tried again.
    """

    checkpoints: dict[int, Path] = field(default_factory=dict)
    seen: dict[int, Pool | None] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass
class Benchmark:
    """A benchmark of one data set.

    Attributes:
        output: folder of the report, and of the networks.
        device: "auto", "cpu" or "cuda".
        given: a pretrained checkpoint that all strategies but the twin start from; None: each fold is pretrained.
    """

    project: Project
    protocol: BenchmarkProtocol
    output: Path
    device: str = "auto"
    given: Path | None = None
    pretrainings: Pretrainings = field(default_factory=Pretrainings)

    @property
    def networks(self) -> Project:
        """The data set with results of the benchmark's own: what else was trained of it stays as it is."""
        return replace(self.project, workspace=replace(self.project.workspace, results=self.output / NETWORKS))

    @property
    def plan_request(self) -> PlanRequest:
        """What was given on top of what this benchmark was planned with, or else the data set was last, as in
        `diffseg run`: another benchmark of the data set may have planned it anew since."""
        recorded = read_record(self.output / PLAN)
        last = PlanRequest.from_json(recorded) if recorded else planning.last_request(self.project)
        return replace(last, **self.protocol.plan)

    def divisions(self) -> tuple[Division, ...]:
        """The protocol's folds. Raises BadInputError as :func:`divisions.divisions` does."""
        return divisions(self.project, self.protocol)

    def preview(self) -> dict[Run, State]:
        """Where each run stands, without doing anything.

        Before the data set is preprocessed it has no splits of its own, and nothing is done.
        """
        protocol, project = self.protocol, self.project
        own_split = protocol.split is None and not protocol.test_cases
        if own_split and not (project.preprocessed / SPLITS_FILE).is_file():
            return dict.fromkeys(list_runs(protocol, len(protocol.folds or (0,))), "to do")
        return self.states(self.divisions())

    def states(self, folds: tuple[Division, ...]) -> dict[Run, State]:
        """Where each run stands, by what was declared; whether files have changed since, :meth:`run` finds out."""
        return {run: state_of(run, self.output, wanted) for run, wanted in self.signatures(folds).items()}

    def signatures(self, folds: tuple[Division, ...]) -> dict[Run, str]:
        """Each run, in order, and a digest of what it depends on."""
        request = self.plan_request.to_json()
        data = [each.raw().content_signature() for each in (self.project, *self._pool())]
        given = None if self.given is None else file_digest(self.given)
        runs = list_runs(self.protocol, len(folds))
        return {
            run: run_signature(
                self.protocol, run, self._settings(run).to_json(), self._of(run, folds), request, data, given
            )
            for run in runs
        }

    def _settings(self, run: Run) -> TrainingSettings:
        return stages.resolved(stages.training_settings(run.strategy, **self._chosen(run)), run.strategy)

    def _chosen(self, run: Run) -> dict[str, Any]:
        """What the protocol and the run say of a training; the rest is the strategy's."""
        return {
            "iterations": self.protocol.iterations,
            "seed": run.seed,
            "optimizer": self.protocol.optimizer,
        }

    def _pool(self) -> list[Project]:
        project = self.project
        return [Project.open(project.workspace, each, project.reporter) for each in self.plan_request.unlabelled]

    def run(self, report: Callable[[Benchmark, tuple[Division, ...]], Any]) -> dict[Run, State]:
        """Everything that is not done; `report` is called after each seed.

        Returns:
            Where each run stands in the end.

        Raises:
            BadInputError: the data, the split or the plan are wrong, or a test case is also trained or pretrained on.
        """
        resolve_device(self.device)  # before hours of work that end there
        folds = self._prepare()
        base = [ensure_fold(self.project, self.protocol.configuration, division) for division in folds]
        signatures = self.signatures(folds)
        for seed in self.protocol.seeds:
            for number, (run, signature) in enumerate(signatures.items(), start=1):
                if run.seed == seed:
                    self.project.reporter.info(f"run {number} of {len(signatures)}: {run.name}")
                    self._attempt(run, self._of(run, folds), self._of(run, base), signature)
            report(self, folds)
        return self.states(folds)

    def _of(self, run: Run, of_folds: Sequence[T]) -> T:
        """What belongs to a run's fold, of something that the benchmark has of each."""
        return of_folds[fold_numbers(self.protocol, len(of_folds)).index(run.fold)]

    def _prepare(self) -> tuple[Division, ...]:
        """Verify, plan and preprocess; refuse what would make the result worthless before anything is trained."""
        project, protocol = self.project, self.protocol
        for strategy in protocol.all_strategies:
            load_registered("trainers", strategy)
        labels = read_label_names(project.raw().folder / DATASET_JSON)
        match_structures(labels, None, find_protocol(protocol.evaluation))
        if protocol.split is not None or protocol.test_cases:
            self.divisions()
        for each in (project, *self._pool()):
            verify(each)
        request = self.plan_request
        self._refuse_another_plan(request)
        planning.plan(project, request)
        if (why := not_scorable(project)) is not None:
            raise BadInputError(why, "Convert the images, and benchmark them.")
        write_json(self.output / PLAN, request.to_json())
        project.configuration(protocol.configuration)
        preprocessing.preprocess(project, (protocol.configuration,))
        self.networks.manifest.adopt(project.manifest, _PREPARED)
        folds = self.divisions()
        refuse_copies(project, self._pool(), folds)
        if self.given is not None:
            self._refuse_unusable(self.given, folds)
        return folds

    def _refuse_another_plan(self, request: PlanRequest) -> None:
        """Raises BadInputError if the data set would be planned anew under networks that were trained by its plan."""
        project = self.project
        if request == planning.last_request(project):
            return
        trained = [
            name
            for name, stage in project.manifest.read()["stages"].items()
            if name.startswith(("pretrain/", "train/", "refine/")) and stage["status"] == "finished"
        ]
        if trained:
            raise BadInputError(
                f"{project.name} is planned otherwise, and has networks of that plan ({listed(trained)}).",
                "Leave the plan's options out, or benchmark another data set of the same images (--id), or in another "
                "--workspace.",
            )

    def _refuse_unusable(self, given: Path, folds: tuple[Division, ...]) -> None:
        """Raises BadInputError if a checkpoint does not fit the plan, or has seen a test case; warns where that cannot
        be found out."""
        adapts = is_planned_source(self.project, file_digest(given))
        refuse_misfit(self.project, TWIN, self.protocol.configuration, TrainingSettings(), given, adapts)
        content = load_safely(given)
        for division in folds:
            refuse_seen(content, self.project.name, division, str(given), learnt_in_training(content, self.project))
        pool, warn = recorded_pool(content), self.project.reporter.warn
        if pool is None:
            warn(f"{given} does not record what it was trained on: whether it has seen test cases is not known")
            return
        workspace, others = self.project.workspace, pool.keys() - {self.project.name}
        here = [Project(workspace, name) for name in sorted(others & {*workspace.dataset_names()})]
        known = [each for each in here if is_verified(each)]  # what is verified has a digest of its voxels already
        refuse_copies(self.project, known, folds, pool)
        if unknown := sorted(others - {each.name for each in known}):
            warn(
                f"{given} has also seen {listed(unknown)}, where copies of test cases were not looked for: no such "
                "data set is here and verified"
            )

    def _attempt(self, run: Run, division: Division, base: int, signature: str) -> None:
        """One run; what goes wrong is recorded, and the others go on. Only what would stop them all is raised."""
        folder, unexpected = run.folder(self.output), None
        try:
            self._complete(run, division, base, signature)
            return
        except DiffSegError as error:
            reason = str(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise  # every other run would meet it, too
            reason, unexpected = f"{type(error).__name__}: {error}", traceback.format_exc()
        # it may have failed before what was scored with other settings was set aside
        if (kept := set_aside_other(run, self.output, signature, "")) is not None:
            self.project.reporter.warn(f"the scores that {run.name} had are kept as {kept}")
        if unexpected is not None:
            write_text(folder / TRACEBACK, unexpected)
        RunRecord("failed", signature, reason=reason).write(folder)
        self.project.reporter.warn(f"{run.name} failed, the others go on: {reason}")
        release_memory(prepare_device(self.device))

    def _complete(self, run: Run, division: Division, base: int, signature: str) -> None:
        project, protocol, folder = self.networks, self.protocol, run.folder(self.output)
        drawn = draw_budget(project, protocol.configuration, base, run.labels, run.seed)
        inputs, known = self._inputs(run, drawn), RunRecord.read(folder)
        if known is not None and known.is_result_of(signature, inputs) and (folder / SCORES_JSON).is_file():
            # its network may be gone by now: scores are what a benchmark keeps
            project.reporter.info(f"{run.name}: scored before, unchanged")
            return
        if (kept := set_aside_other(run, self.output, signature, inputs)) is not None:
            project.reporter.warn(f"the scores of {run.name} with other data or settings are kept as {kept}")
        pretrained = None if run.strategy == TWIN else self.pretrained(base, division)
        model = project.model_folder(run.strategy, protocol.configuration) / f"fold_{drawn.fold}"
        stage = stages.training_stage(run.strategy, protocol.configuration, drawn.fold)
        before, started = project.manifest.stage(stage), monotonic()
        checkpoint = stages.train(
            project,
            protocol.configuration,
            drawn.fold,
            self.device,
            run.strategy,
            pretrained,
            **self._chosen(run),
        )
        digest, after = file_digest(checkpoint), project.manifest.stage(stage)
        self._test(run, division, model, checkpoint)
        gone_on_with = before.get("signature") == after["signature"]
        seconds = None if gone_on_with else round(monotonic() - started, 1)
        RunRecord(
            "finished",
            signature,
            inputs,
            checkpoint=digest,
            pretrained=None if pretrained is None else file_digest(pretrained),
            saw={} if run.strategy == TWIN else self.pretrainings.seen[base],
            labelled_cases=len(drawn.train),
            labelled_slices=None if drawn.slices is None else sum(map(len, drawn.slices.values())),
            missing=drawn.missing,
            seconds=seconds,
            iterations=protocol.iterations,
            reads=after["outputs"].get("reads"),
        ).write(folder)
        (folder / TRACEBACK).unlink(missing_ok=True)  # of an earlier attempt

    def _inputs(self, run: Run, drawn: BudgetFold) -> str:
        """Digest of what a run's result depends on; a checkpoint that was given is among what is declared."""
        project, protocol = self.project, self.protocol
        configuration, settings = protocol.configuration, self._settings(run)
        inputs = stages.training_inputs(project, configuration, drawn.fold, run.strategy, settings)
        if run.strategy != TWIN and self.given is None:
            length = {"iterations": protocol.pretrain_iterations, "seed": protocol.pretrain_seed}
            pretraining = PretrainingSettings.from_plan(diffseg_section(project.plans()), **length)
            inputs["pretraining"] = replace(pretraining, workers=None).to_json()
        return manifest.signature(inputs)

    def _test(self, run: Run, division: Division, model: Path, checkpoint: Path) -> None:
        """Score the predictions of the test cases, which the training has ended with, and keep its course."""
        project, folder = self.project, run.folder(self.output)
        evaluate(
            model / "validation",
            project.preprocessed / "gt_segmentations",
            project.preprocessed / DATASET_JSON,
            folder,
            protocol=find_protocol(self.protocol.evaluation),
            cases=division.test,
            progress=lambda done, total: project.reporter.progress(f"evaluate {run.name}", done, total),
        )
        per_epoch = split_iterations(self.protocol.iterations).iterations_per_epoch
        LearningCurve.of(load_safely(checkpoint), per_epoch).write(folder)

    def pretrained(self, base: int, division: Division) -> Path:
        """The network pretrained on a base fold, or the one that was given; neither has seen a test case.

        Raises:
            BadInputError: it could not be made before, or has seen a test case.
        """
        known = self.pretrainings
        if base in known.failed:
            raise BadInputError(f"The pretraining of fold {base} failed: {known.failed[base]}")
        if base not in known.checkpoints:
            try:
                self._pretrain(base, division)
            except Exception as error:
                known.failed[base] = str(error)
                raise
        return known.checkpoints[base]

    def _pretrain(self, base: int, division: Division) -> None:
        protocol = self.protocol
        checkpoint = self.given or stages.pretrain(
            self.networks,
            protocol.configuration,
            base,
            self.device,
            iterations=protocol.pretrain_iterations,
            seed=protocol.pretrain_seed,
        )
        content = load_safely(checkpoint)
        refuse_seen(content, self.project.name, division, str(checkpoint))
        self.pretrainings.seen[base] = recorded_pool(content)
        self.pretrainings.checkpoints[base] = checkpoint
