"""``diffseg demo`` alone, in the present environment: time, peak memory, scores.

Usage: python benchmarks/demo.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from fresh_machine import measured
from results import table, write_section


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        seconds, peak, _ = measured("diffseg demo", Path(temporary))
        scores = json.loads((Path(temporary) / "diffseg_demo" / "report" / "scores.json").read_text())
    overall = scores["overall"]
    rows = [
        (
            entry["structure"],
            f"{entry['dsc']['mean']:.3f}",
            f"{entry['nsd']['mean']:.3f}",
            f"{entry['hd95_mm']['mean']:.1f}",
        )
        for entry in scores["structures"]
    ]
    rows.append(("mean", *(f"{overall[s]['mean']:.{d}f}" for s, d in (("dsc", 3), ("nsd", 3), ("hd95_mm", 1)))))
    write_section(
        "demo",
        "## The demo\n\nScript: `benchmarks/demo.py`. The built-in phantom through every stage, seed 0: "
        f"**{seconds / 60:.1f} minutes**, peak **{peak:.1f} GiB** (shared pages counted once). Scores of the "
        f"{len(scores['case_means'])} held-out cases, which no stage has seen; mean DSC "
        f"[{overall['dsc']['ci_low']:.3f}, {overall['dsc']['ci_high']:.3f}] (95 % CI over cases).\n\n"
        + table(("structure", "DSC", "NSD at 1 mm", "HD95 mm"), rows),
    )


if __name__ == "__main__":
    main()
