"""What the scripts share: sections of RESULTS.md (every figure there was printed by a script), commands, resuming."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import write_json, write_text
from diffseg_nnunet.evaluation.statistics import mean_with_interval
from diffseg_nnunet.planning.gpus import visible_gpus
from diffseg_nnunet.planning.hardware import memory_limit_gib, usable_cores

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "# Results\n\nEach section is written by the script it names; run the script to renew it.\n"
PACKAGES = ("diffseg_nnunet", "nnunetv2", "torch", "numpy")


def write_section(name: str, body: str) -> None:
    """Replace or append the section `name` of RESULTS.md, dated, with hardware and versions."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else HEADER
    section = f"<!-- {name} -->\n{body.strip()}\n\n*{conditions()}*\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->", re.DOTALL)
    text, replaced = pattern.subn(lambda _: section, text)
    write_text(RESULTS, text if replaced else f"{text.rstrip()}\n\n{section}\n")


def conditions() -> str:
    """Date, hardware and versions, one line."""
    gpus = ", ".join(gpu.name for gpu in visible_gpus()) or "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{date.today().isoformat()}; {usable_cores()} cores ({_processor()}), {memory_limit_gib():.0f} GiB, {gpus}; "
        f"python {platform.python_version()}, {versions}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def diffseg(*arguments: object, environment: Mapping[str, str] | None = None) -> None:
    """Run a diffseg command and let it speak; a failure ends the script, a conversion's warnings do not.

    Args:
        environment: of the command; None: this process's own.
    """
    command = ["diffseg", *(str(argument) for argument in arguments)]
    print("$", *command, flush=True)
    finished = subprocess.run(command, check=False, env=environment)
    if finished.returncode not in ((0, 1) if arguments[0] == "convert" else (0,)):
        raise subprocess.CalledProcessError(finished.returncode, command)


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, JSON values only: computed once and kept at `path`, so that a script can be run again."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Mean and its 95 % interval, "1.23 [1.10, 1.36]"; bootstrap over the values."""
    estimate = mean_with_interval(values)
    if estimate.ci_low is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} [{estimate.ci_low:.{digits}f}, {estimate.ci_high:.{digits}f}]"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
