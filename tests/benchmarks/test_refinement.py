"""Before and after are paired by case, structure and seed; every part of the report is there."""

from __future__ import annotations

import math

import pytest
import refinement_costs
import refinement_tables as tables
from calibration import Calibration
from refinement import structures_part
from refinement_runs import SOURCES

from diffseg_nnunet.evaluation.statistics import Evaluation, ScoreRow, case_means, summarise_all, summarise_structure
from diffseg_nnunet.refinement.network import Refiner, RefinerArchitecture

SMALL = SOURCES["abdomen"].small
ORGANS = ("liver", *SMALL)


def evaluation(dsc: dict[str, float], hd95: float = 4.0) -> Evaluation:
    """Case -> DSC of its liver; small organs have half of it."""
    rows = [
        ScoreRow(case, organ, value if organ == "liver" else value / 2, value, hd95, 1.0, 1.0)
        for case, value in dsc.items()
        for organ in ORGANS
    ]
    structures = tuple(summarise_structure(organ, rows) for organ in ORGANS)
    settings = {"protocol": "plain", "structures": list(ORGANS)}
    return Evaluation(tuple(rows), structures, case_means(rows), summarise_all(rows), settings, ())


def scored(dsc: dict[str, float], error: float = 0.1, **more: float) -> tables.Scored:
    return tables.Scored(evaluation(dsc, **more), {case: Calibration(error, 0.8, 1 - v) for case, v in dsc.items()})


def cells(table: str, row: int = 0) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


@pytest.fixture
def setting() -> tables.Setting:
    """Case b is of the first seed alone, as a training scan that the second seed has drawn."""
    before = (scored({"a": 0.4, "b": 0.6, "c": 0.5}), scored({"a": 0.6, "c": 0.5}))
    after = (scored({"a": 0.6, "b": 0.6, "c": 0.7}, error=0.05), scored({"a": 0.6, "c": 0.7}, error=0.05))
    return tables.Setting("2cases", "frozen", before, after)


def test_seeds_are_averaged_before_cases(setting):
    before, after = setting.evaluations()
    liver = {row.case: row.dsc for row in after.rows if row.structure == "liver"}
    assert liver == pytest.approx({"a": 0.6, "b": 0.6, "c": 0.7})
    liver = {row.case: row.dsc for row in before.rows if row.structure == "liver"}
    assert liver == pytest.approx({"a": 0.5, "b": 0.6, "c": 0.5})
    found = cells(tables.score_table([setting]))
    share = (1 + len(SMALL) / 2) / len(ORGANS)  # mean over the organs of a case whose liver has 1
    assert found[:4] == ["2cases", "frozen", "3", f"{0.5333 * share:.3f} → {0.6333 * share:.3f}"]
    assert found[4].startswith(f"+{0.1 * share:.3f} [")


def test_what_one_side_does_not_define_is_left_out_on_both():
    missing = evaluation({"a": 0.5, "b": 0.5})
    rows = tuple(
        tables.replace(row, hd95_mm=math.nan) if (row.case, row.structure) == ("a", "liver") else row
        for row in missing.rows
    )
    before, after = tables.defined_on_both(tables.replace(missing, rows=rows), evaluation({"a": 0.6, "b": 0.6}, hd95=9))
    for side in (before, after):
        undefined = {(row.case, row.structure) for row in side.rows if math.isnan(row.hd95_mm)}
        assert undefined == {("a", "liver")}
    overall = tables.over_seeds([after]).overall
    assert (overall.n_undefined_hd95, overall.hd95_mm.mean, overall.dsc.n) == (1, 9, 2)


def test_small_organs_alone(setting):
    _, after = setting.evaluations(SMALL)
    assert after.overall.dsc.mean == pytest.approx(0.95 / 3)
    found = cells(tables.structure_table([setting], SMALL))
    assert len(found) == 2 + len(SMALL)
    assert found[2].startswith("0.267 → 0.317; +0.050 [")


def test_a_data_set_without_small_structures_has_all_of_them(setting):
    assert "Small organs alone" in structures_part(SOURCES["abdomen"], [setting])
    text = structures_part(SOURCES["hippocampus"], [setting])
    assert "Small" not in text
    assert "| liver |" in text


def test_calibration_table(setting):
    found = cells(tables.calibration_table([setting]))
    assert found[2] == "0.1000 → 0.0500"
    assert found[3].startswith("-0.0500 [-0.0500")
    assert found[5] == "0.8000 → 0.8000"
    assert found[8] == "1.00 → 1.00"
    bare = tables.replace(setting, after=tuple(tables.replace(each, calibrations={}) for each in setting.after))
    assert len(tables.calibration_table([bare]).splitlines()) == 2


def test_default_is_the_best_gain_or_none(setting):
    worse = tables.Setting("2cases", "binary", setting.after, setting.before)
    said = tables.said_of_default([worse, setting])
    assert "speaks for **frozen** (2cases: +" in said
    assert said.endswith("not lowered by: frozen.")
    assert "against refining at all" in tables.said_of_default([worse])


def test_others_are_compared_with_the_default_of_the_same_seeds(setting):
    default = tables.replace(setting, variant="frozen", seeds=(0, 1))
    other = tables.replace(default, refiner="binarised", variant="binary", before=setting.after, after=setting.before)
    fewer = tables.replace(other, variant="fewer", seeds=(0,))
    (found,) = tables.against([default, other, fewer], "frozen")
    assert (found.refiner, found.before, found.after) == ("binarised", default.after, other.after)
    assert tables.against([other, fewer], "frozen") == []


def test_bytes_of_weights():
    kinds = {}
    for binary in (False, True):
        plan = RefinerArchitecture(1, 3, (8, 8, 16), ((1, 1, 1), (2, 2, 2), (2, 2, 2)), ((3, 3, 3),) * 3, (12,), binary)
        network = Refiner(plan)
        content = {"refiner_architecture": plan.to_json(), "refiner_weights": network.state_dict()}
        kinds[binary] = (network, *refinement_costs.refiner_bytes(content))
    network, stored, full, bits = kinds[False]
    count = sum(p.numel() for p in network.parameters())
    assert (stored, full, bits) == (4 * count, 4 * count, 0)
    network, stored, full, bits = kinds[True]
    assert bits > 1000
    saved = full - stored
    assert saved == pytest.approx(bits * (4 - 1 / 8), rel=0.05)  # but for the scales
    assert stored < full


def test_costs_are_told_in_multiples_of_the_plain_prediction():
    plain = {"seconds": 10.0, "processor_seconds": 8.0, "gib": 1.0, "share": 0.0}
    refined = {"seconds": 50.0, "processor_seconds": 48.0, "gib": 1.5, "share": 0.25}
    found = refinement_costs.cost_table({"plain": plain, "refined": refined})
    assert cells(found, 1) == ["refined", "50.0 (× 5.0)", "48.0 (× 6.0)", "1.50 (× 1.50)", "25.0%"]
