"""What a benchmark runs, declared: data, division of the cases, strategies, label budgets, seeds, lengths, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.protocols import find_protocol

TWIN = "scratch"
"""The strategy all others are compared with: same plan, cases, batches, length and seed, random weights, and the
optimizer's rate for them."""
OWN_SPLIT = "own"
"""Name of a division that a user chose; nothing published is on it."""


@dataclass(frozen=True)
class BenchmarkProtocol:
    """One benchmark.

    Attributes:
        name: as the command takes it.
        summary: one sentence.
        converter: registered name of the format that a download is converted by; None: any data set, converted before.
        conversion: options of that converter.
        split: name of a published division that the converter knows, whose validation parts are the test cases; None:
            the data set's own splits.
        folds: which folds of the split; None: all of them.
        test_cases: identifiers; all other labelled cases train. Overrides the split.
        strategies: registered trainers, without the twin, which always runs.
        budgets: as :class:`LabelBudget` writes them, drawn from a fold's training cases.
        seeds: each draws other labels and another stream of batches.
        iterations: of every training, whatever the strategy and the budget.
        pretrain_iterations, pretrain_seed: of the one pretraining of a fold, for all seeds, since it sees no label.
        configuration: nnU-Net's.
        optimizer: of every training.
        evaluation: protocol of `diffseg evaluate`.
        plan: fields of PlanRequest that differ from what the data set was last planned with.
    """

    name: str
    summary: str
    converter: str | None
    split: str | None
    evaluation: str
    budgets: tuple[str, ...]
    strategies: tuple[str, ...] = ("finetune",)
    conversion: Mapping[str, Any] = field(default_factory=dict)
    folds: tuple[int, ...] | None = None
    test_cases: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 37_500  # 150 epochs of 250: nnU-Net's shorter schedule for pretrained networks
    pretrain_iterations: int = 250_000
    pretrain_seed: int = 0
    configuration: str = "3d_fullres"
    optimizer: str = "sgd"
    plan: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(s for s in dict.fromkeys(self.strategies) if s != TWIN))
        object.__setattr__(self, "budgets", _ordered(self.budgets))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))
        if self.folds is not None:  # a fold given twice would count each of its test cases twice
            object.__setattr__(self, "folds", tuple(dict.fromkeys(self.folds)))
        for what, given in (("budget", self.budgets), ("seed", self.seeds)):
            if not given:
                raise BadInputError(f"The benchmark {self.name} has no {what}.", f"Give one with --{what}s.")
        for option, seed in (("--seeds", min(self.seeds)), ("--pretrain-seed", self.pretrain_seed)):
            if seed < 0:
                raise BadInputError(f"{seed} is no seed.", f"Give whole numbers from 0 with {option}.")
        find_protocol(self.evaluation)

    @property
    def all_strategies(self) -> tuple[str, ...]:
        """The twin first: what it is compared with comes after it."""
        return (TWIN, *self.strategies)

    @property
    def split_name(self) -> str:
        """What results on these test cases are called."""
        return OWN_SPLIT if self.test_cases or self.split is None else self.split

    def changed(self, **options: Any) -> BenchmarkProtocol:
        """This protocol with other fields; those of `plan` are added to what it has.

        Raises:
            BadInputError: a budget or the protocol of the evaluation is unknown, or nothing is left to run.
        """
        return replace(self, **{**options, "plan": {**self.plan, **options.get("plan", {})}})

    def to_json(self) -> dict[str, Any]:
        """All of it, for the manifest."""
        return json.loads(json.dumps(asdict(self) | {"twin": TWIN}))


def _ordered(budgets: tuple[str, ...]) -> tuple[str, ...]:
    """Canonical and each once; small ones first within a kind."""
    parsed = {str(budget): budget for budget in map(LabelBudget.parse, budgets)}
    return tuple(sorted(parsed, key=lambda text: (parsed[text].is_sparse, parsed[text].kind, parsed[text].amount)))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        BenchmarkProtocol(
            "btcv",
            "BTCV, 13 organs, MONAI's 24/6 split: few of 24 labelled cases, tested on 0035 to 0040.",
            converter="btcv",
            split="24/6",
            evaluation="btcv",
            strategies=("finetune", "decoder", "linear", "nonlinear"),
            budgets=("2cases", "6cases", "12cases", "24cases"),
        ),
        BenchmarkProtocol(
            "synapse8",
            "BTCV, TransUNet's 18/12 split and 8 organs ('Synapse').",
            converter="btcv",
            split="18/12",
            evaluation="synapse8",
            budgets=("2cases", "6cases", "18cases"),
        ),
        BenchmarkProtocol(
            "flare22",
            "FLARE22: 50 labelled scans and the pool of 2000, nothing else; tested on the 50 tuning scans.",
            converter="flare22",
            conversion={"tuning_as_validation": True},
            split="tuning",
            evaluation="flare22",
            strategies=("finetune", "decoder", "linear"),
            budgets=("4slices", "1case", "5cases", "50cases"),
        ),
        BenchmarkProtocol(
            "few-label",
            "Any data set: few of the labelled cases of fold 0, tested on its validation cases.",
            converter=None,
            split=None,
            evaluation="plain",
            folds=(0,),
            budgets=("2cases", "10%", "100%"),
        ),
    )
}


def find_benchmark(name: str) -> BenchmarkProtocol:
    """The protocol of a name. Raises BadInputError if there is none; the message lists those there are."""
    if name not in PROTOCOLS:
        raise BadInputError(f"There is no benchmark '{name}'.", f"Choose one of: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
