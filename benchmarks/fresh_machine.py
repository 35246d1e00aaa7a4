"""The README's two commands on a clone in an empty folder: time, peak memory, scores, tests.

Usage: python benchmarks/fresh_machine.py REPOSITORY
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from time import monotonic

import psutil
from results import RESULTS, table, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, nargs="?", default=RESULTS.parents[1])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "main"
        subprocess.run(["git", "clone", "--quiet", str(options.repository.resolve()), str(clone)], check=True)
        install_and_demo, tests = re.findall(r"```bash\n(.+?)\n```", (clone / "README.md").read_text(), re.DOTALL)[:2]
        install, demo = install_and_demo.rsplit(" && ", 1)
        rows, scores = [], None
        for name, command in (("install", install), ("demo", demo), ("tests", tests)):
            seconds, peak, output = measured(command, clone)
            rows.append((f"{name}: `{command}`", f"{seconds / 60:.1f}", f"{peak:.1f}", _last_line(output, name)))
            if name == "demo":
                scores = json.loads((clone / "diffseg_demo" / "report" / "scores.json").read_text())
    overall = scores["overall"]["dsc"]
    structures = [f"{entry['structure']} {entry['dsc']['mean']:.2f}" for entry in scores["structures"]]
    write_section(
        "fresh-machine",
        "## A fresh clone, the README's two commands\n\nScript: `benchmarks/fresh_machine.py`. Peak memory of the "
        "command and its children, shared pages counted once.\n\n"
        + table(("command", "minutes", "peak GiB", "ends with"), rows)
        + f"\n\nDemo, {len(scores['case_means'])} held-out phantoms: mean DSC **{overall['mean']:.3f}** "
        f"[{overall['ci_low']:.3f}, {overall['ci_high']:.3f}] "
        f"({', '.join(structures)}).",
    )


def measured(command: str, folder: Path) -> tuple[float, float, str]:
    """Wall seconds, peak GiB and output of a shell command of the README."""
    start, peak, done = monotonic(), 0, threading.Event()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def watch() -> None:
        nonlocal peak
        while not done.wait(1.0):
            peak = max(peak, _resident_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    done.set()
    watcher.join()
    assert code == 0, f"{command}: exit code {code}"
    return monotonic() - start, peak / 2**30, "".join(lines)


def _resident_bytes(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)])
    except psutil.Error:
        return 0


def _last_line(output: str, name: str) -> str:
    if name == "install":
        return ""
    pattern = r"\d+ passed.*" if name == "tests" else r"picture: .*"
    found = re.findall(pattern, output)
    return found[-1].strip(" =").split("/")[-1] if found else "?"


if __name__ == "__main__":
    main()
