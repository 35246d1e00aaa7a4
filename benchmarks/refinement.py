"""What the refiner (HiDiff, arXiv 2407.03548) is worth: segmentations before and after, paired, and what it costs.

Usage: python benchmarks/refinement.py WORKSPACE [--data-set abdomen] [--strategy finetune] [--budgets 2cases 14cases]
           [--seeds 0 1 2] [--variants frozen alternate binary binary_alternate published published_alternate
           published_binary entropy bounded] [--iterations 600] [--measured] [--apart WORDS] [--no-report]

WORKSPACE is few_labels.py's (few_labels_hippocampus.py's with `--data-set hippocampus`), and the segmentors are those
that it trained. Each is refined in every variant, with results of its own. The cases that the segmentors were tested
on are tested on; what is to be chosen is told by the training cases that a budget left unlabelled, whose labels neither
the segmentor nor the refiner has seen. What is done is not done twice, and several processes may share the work, each
with other budgets, seeds or variants and `--no-report`; the last call, with all of them, measures time and memory,
which wants a machine that is otherwise idle, and reports; with `--measured`, on what there is; with `--apart`, in a
section of its own. `bounded` comes after `frozen`, whose checkpoint it reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from calibration import BINS, MARGIN_MM
from refinement_costs import COST_CASES, bytes_table, cost_table, prediction_costs
from refinement_runs import (
    ALONE,
    SOURCES,
    TEST,
    TRAINERS,
    TUNING,
    VARIANTS,
    WORDS,
    Refinement,
    Source,
    find_segmentors,
    plain,
)
from refinement_tables import Setting, against, calibration_table, said_of_default, score_table, structure_table
from results import write_section

from diffseg_nnunet.training.refining import RefinementSettings
from diffseg_nnunet.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="of the segmentors")
    parser.add_argument("--data-set", choices=SOURCES, default="abdomen")
    parser.add_argument("--strategy", choices=TRAINERS, default="finetune", help="that trained the segmentors")
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--iterations", type=int, default=600, help="of every refiner")
    parser.add_argument("--width", type=int, default=8, help="of the refiner's first stage")
    parser.add_argument("--samples", type=int, default=4, help="averaged")
    parser.add_argument("--sampling-steps", type=int, default=1, help="of the reverse process, trained with 10")
    parser.add_argument("--tuning-scans", type=int, default=6, help="of each segmentor that has any, the first")
    parser.add_argument("--measured", action="store_true", help="report what is measured, and leave out all else")
    parser.add_argument("--apart", metavar="WORDS", help="report in a section of its own, of this name")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    options.source = source = SOURCES[options.data_set].trained_by(options.strategy).apart(options.apart)
    options.budgets, options.seeds = options.budgets or source.budgets, options.seeds or source.seeds
    Workspace.locate(options.workspace.resolve()).activate()
    segmentors = find_segmentors(options)
    refinements = [Refinement(each, variant, options) for each in segmentors for variant in options.variants]
    if options.measured:
        refinements = [each for each in refinements if each.is_measured]
    for refinement in refinements:
        for part in refinement.parts:
            plain(refinement.segmentor, part)
            refinement.measure(part)
    if not options.no_report:
        write_section(source.section, _report(options, refinements))


def _settings(options: argparse.Namespace, refinements: Sequence[Refinement], part: str) -> list[Setting]:
    """The rows of a table: budget by budget, variant by variant, each over its seeds."""
    rows = []
    for labels, variant in dict.fromkeys((each.segmentor.labels, each.variant) for each in refinements):
        own = [each for each in refinements if (each.segmentor.labels, each.variant) == (labels, variant)]
        own = [each for each in own if part in each.parts]
        if own:
            before = tuple(plain(each.segmentor, part) for each in own)
            seeds = [each.segmentor.seed for each in own]
            fewer = "" if seeds == list(options.seeds) else f" (seeds {', '.join(map(str, seeds))})"
            words = WORDS[variant] + (": its segmentor alone" if part == ALONE else "") + fewer
            after, name = tuple(each.measure(part) for each in own), f"{variant}_{ALONE}" if part == ALONE else variant
            rows.append(Setting(labels, words, before, after, name, tuple(seeds)))
    return rows


def _report(options: argparse.Namespace, refinements: Sequence[Refinement]) -> str:
    source, default = options.source, RefinementSettings()
    tuning, test, alone = (_settings(options, refinements, part) for part in (TUNING, TEST, ALONE))
    untuned = sorted({each.segmentor.labels for each in refinements if not each.segmentor.tuning})
    none_left = f" With {' and '.join(untuned)} no training scan is left to choose by." if untuned else ""
    chosen = f"{score_table(tuning)}\n\n{said_of_default(tuning)}{none_left}" if tuning else none_left.strip()
    return f"""## {source.title}

Script: `benchmarks/refinement.py`. The segmentors are those that `benchmarks/{source.script}` \
{"fine-tuned" if options.strategy == "finetune" else "trained from scratch"}, \
seeds {", ".join(map(str, options.seeds))} (other labelled cases for each). Each refiner has {options.iterations} \
iterations, width {options.width}, patches of {"×".join(map(str, source.patch))}, T = 10, and averages \
{options.samples} samples of {options.sampling_steps} DDIM step(s); the command's defaults are {default.iterations:,} \
iterations and {default.samples} samples of {default.sampling_steps} step(s). "Before" is the segmentor as it was, \
predicted with test-time mirroring as it is refined; \
`alternate` trains a copy of it on. Protocol `plain`, NSD at 1 mm. The refiners learn from the segmentor's own \
labelled cases alone.

Differences are after minus before, of the same case, structure and seed, averaged over the seeds first; [95 % \
bootstrap interval over cases] and p of a two-sided Wilcoxon signed-rank test over cases, in brackets with Holm's \
correction over the rows. What one side does not define (the HD95 of a structure it misses) is left out on both.

### Training scans without labels: what is to be chosen

Scans that may be trained and tuned on, and whose labels the segmentor and its refiner have not seen: \
{options.tuning_scans} for each seed. The command's default is {WORDS[default.segmentor]}.

{chosen}

{_against_default(tuning, default)}### Test

{source.tested}.

{score_table([*test, *alone])}

{_against_default([*test, *alone], default)}{structures_part(source, test)}

### Calibration, test cases

Of the voxels in the box around the reference's structures, widened by {MARGIN_MM:g} mm: the same before and after, \
chosen by no prediction. Expected calibration error of the most probable class, {BINS} bins of equal width; the area \
under the ROC curve by which a voxel's entropy tells that its label is wrong (0.5: not at all); over cases, the rank \
correlation of the mean entropy with 1 − DSC.

{calibration_table(test)}

### Time and memory

`diffseg predict` on {COST_CASES} test cases, from its start to its end, one command after the other in one run.

{cost_table(prediction_costs(refinements))}

### Bytes of weights

{bytes_table(refinements, test)}"""


def _against_default(settings: Sequence[Setting], default: RefinementSettings) -> str:
    """The other settings beside the command's default, where there are any; ends with an empty line."""
    others = against(settings, default.segmentor)
    if not others:
        return ""
    words = f'Of the same seeds, with what "{WORDS[default.segmentor]}" made of them as before'
    return f"{words}:\n\n{score_table(others)}\n\n"


def structures_part(source: Source, test: Sequence[Setting]) -> str:
    """Small structures together, and one by one; of a data set without such, all of them one by one."""
    if source.small:
        together = f"Small organs alone:\n\n{score_table(test, source.small)}\n\n"
        return f"{together}DSC, organ by organ:\n\n{structure_table(test, source.small)}"
    names = tuple(each.structure for each in test[0].evaluations()[0].structures)
    return f"DSC by structure:\n\n{structure_table(test, names)}"


if __name__ == "__main__":
    main()
