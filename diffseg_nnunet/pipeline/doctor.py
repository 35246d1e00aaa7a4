"""What ``diffseg doctor`` looks at: whether this machine can do the work, and what to mend where it cannot.

Nothing is created or changed. Every check stands alone: one that fails is reported as a problem, the others still run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER
from diffseg_nnunet.planning import gpus, hardware
from diffseg_nnunet.workspace import NNUNET_VARIABLES, WORKSPACE_VARIABLE, Workspace

Status = Literal["ok", "warning", "problem"]

# the ranges pyproject.toml declares; a test holds them to it
PYTHON_FROM = (3, 11)
NNUNET_FROM, NNUNET_BELOW = (2, 8, 1), (2, 10)
TORCH_FROM = (2, 6)
TORCH_EXCLUDED = (2, 9)  # by nnU-Net

LITTLE_MEMORY_GIB = 8.0  # a training process and its workers take 3 to 6 GiB on small data, prediction of a CT more
LITTLE_SHARED_MEMORY_GIB = 1.0
LITTLE_DISK_GIB = 10.0

_TRUE, _FALSE = ("true", "1", "t"), ("false", "0", "f")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: 'ok'; 'warning': works, but slower or with a risk; 'problem': a stage will fail.
        finding: what was found.
        mend: what to do about it; None where nothing is to be done.
    """

    name: str
    status: Status
    finding: str
    mend: str | None = None


def run_checks(workspace: Workspace, requested: Path | str | None = None) -> list[Check]:
    """Look at python, torch, GPUs, CPU, memory, disk, nnU-Net, its variables and the workspace.

    Args:
        workspace: as located; its folders need not exist.
        requested: the folder the user asked for with --workspace, to notice exported variables that win over it;
            None: $DIFFSEG_WORKSPACE, if set.
    """
    checks: dict[str, Callable[[], Check | list[Check]]] = {
        "python": _python,
        "torch": _torch,
        "GPU": _gpus,
        "CPU bf16": _cpu_bf16,
        "CPU cores": _cores,
        "memory": _memory,
        "shared memory": _shared_memory,
        "disk": lambda: _disk(workspace),
        "workspace": lambda: _workspace(workspace),
        "nnU-Net": _nnunet,
        "nnU-Net paths": lambda: _paths(workspace, requested or os.environ.get(WORKSPACE_VARIABLE)),
        "nnUNet_extTrainer": _external_trainers,
        "nnU-Net processes": _processes,
        "nnUNet_compile": _compile,
        "trainer shim": _shim,
    }
    found: list[Check] = []
    for name, check in checks.items():
        try:
            result = check()
        except Exception as error:  # a broken installation can fail anywhere, and is what this command is for
            result = Check(name, "problem", f"cannot be told: {type(error).__name__}: {error}")
        found += result if isinstance(result, list) else [result]
    return found


def _python() -> Check:
    if sys.version_info < PYTHON_FROM:
        return Check("python", "problem", platform.python_version(), f"Use Python {_dotted(PYTHON_FROM)} or newer.")
    return Check("python", "ok", platform.python_version())


def _torch() -> Check:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    finding = f"{torch.__version__}, built for {built_for if torch.version.cuda or torch.version.hip else 'CPU only'}"
    number = _numbers(torch.__version__)
    if number < TORCH_FROM:
        return Check("torch", "problem", finding, f"Install torch {_dotted(TORCH_FROM)} or newer.")
    if number[:2] == TORCH_EXCLUDED:
        return Check("torch", "warning", finding, "nnU-Net excludes this version: install a newer or an older one.")
    return Check("torch", "ok", finding)


def _gpus() -> list[Check]:
    reason = gpus.no_gpu_reason()
    if reason is not None:
        mend = "For a GPU, install a CUDA build of torch that suits the driver, and see that nvidia-smi lists the GPU."
        return [Check("GPU", "warning", f"{reason}: everything runs on the CPU, many times slower", mend)]
    driver = _driver_version()
    checks = []
    for gpu in gpus.visible_gpus():
        finding = f"{gpu.index}: {gpu.name}, {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free{driver}"
        if gpu.free_gib - gpus.GPU_RESERVE_GIB < gpus.SMALLEST_BUDGET_GIB:
            mend = "End what uses it, or choose another with CUDA_VISIBLE_DEVICES."
            checks.append(Check("GPU", "problem", finding, mend))
        else:
            checks.append(Check("GPU", "ok", finding))
    return checks


def _driver_version() -> str:
    """', driver ...' as nvidia-smi says it; empty where it is not there to ask."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", driver {answer[0]}" if answer else ""


def _cpu_bf16() -> Check:
    instructions = hardware.cpu_bf16_instructions()
    if instructions is None:
        return Check("CPU bf16", "ok", "cannot be told on this system")
    if instructions:
        slow = "" if hardware.cpu_gains_by_bf16() else ", no faster than float32 on this CPU, which is taken"
        return Check("CPU bf16", "ok", f"{', '.join(instructions)}{slow}")
    if gpus.no_gpu_reason() is None:
        return Check("CPU bf16", "ok", "none; not needed beside a GPU")
    mend = "A CPU with amx_bf16, or AMD's with avx512_bf16, takes about half the time for each step."
    return Check("CPU bf16", "warning", "this CPU has no bfloat16 instructions", mend)


def _cores() -> Check:
    usable, present = hardware.usable_cores(), os.cpu_count() or 1
    finding = str(usable) if usable == present else f"{usable} of the machine's {present} (cgroup or affinity)"
    if usable == 1:
        mend = "Give the container or job 2 or more cores: augmentation runs beside training."
        return Check("CPU cores", "warning", finding, mend)
    return Check("CPU cores", "ok", finding)


def _memory() -> Check:
    limit, available = hardware.memory_limit_gib(), hardware.available_memory_gib()
    finding = f"{available:.1f} of {limit:.1f} GiB available"
    if available < LITTLE_MEMORY_GIB:
        mend = "End other programs, give the container more, or set nnUNet_def_n_proc=1 and nnUNet_n_proc_DA=1."
        return Check("memory", "warning", finding, mend)
    return Check("memory", "ok", finding)


def _shared_memory() -> Check:
    free = hardware.shared_memory_gib()
    if free is None:
        return Check("shared memory", "ok", "this system has no /dev/shm")
    finding = f"{free:.2f} GiB free in /dev/shm"
    if free < LITTLE_SHARED_MEMORY_GIB:
        mend = (
            "Start the container with docker run --shm-size=8g (or --ipc=host): nnU-Net's workers hand batches over it."
        )
        return Check("shared memory", "warning", finding, mend)
    return Check("shared memory", "ok", finding)


def _disk(workspace: Workspace) -> Check:
    roots = (workspace.raw, workspace.preprocessed, workspace.results)
    free, root = min((hardware.free_disk_gib(root), root) for root in roots)
    finding = f"{free:.1f} GiB free at {root}"
    if free < LITTLE_DISK_GIB:
        mend = "Free some, or put the workspace on another disk with --workspace: preprocessed data is large."
        return Check("disk", "warning", finding, mend)
    return Check("disk", "ok", finding)


def _workspace(workspace: Workspace) -> Check:
    for root in (workspace.raw, workspace.preprocessed, workspace.results):
        existing = hardware.nearest_existing(root)
        try:
            # asking for permission is not enough: root may write anywhere, but not on a read-only file system
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            mend = "Choose another folder with --workspace, or mend its permissions."
            return Check("workspace", "problem", f"{existing} cannot be written to: {error.strerror}", mend)
    parents = {str(root.absolute().parent) for root in (workspace.raw, workspace.preprocessed, workspace.results)}
    return Check("workspace", "ok", ", ".join(sorted(parents)))


def _nnunet() -> Check:
    wanted = f">={_dotted(NNUNET_FROM)},<{_dotted(NNUNET_BELOW)}"
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        return Check("nnU-Net", "problem", "nnunetv2 is not installed", f"pip install 'nnunetv2{wanted}'")
    if NNUNET_FROM <= _numbers(found) < NNUNET_BELOW:
        return Check("nnU-Net", "ok", found)
    return Check("nnU-Net", "problem", f"{found} is not supported", f"pip install 'nnunetv2{wanted}'")


def _paths(workspace: Workspace, requested: Path | str | None) -> list[Check]:
    """Exported variables win over --workspace; say so where they lead elsewhere."""
    base = None if requested is None else Path(requested).expanduser().resolve()
    checks = []
    for variable, used in zip(
        NNUNET_VARIABLES, (workspace.raw, workspace.preprocessed, workspace.results), strict=True
    ):
        exported = os.environ.get(variable)
        if not exported:
            continue
        asked = used if base is None else base / variable
        if Path(exported).expanduser().resolve() != asked.expanduser().resolve():
            finding = f"exported as {exported}, which wins over {asked}"
            checks.append(Check(variable, "warning", finding, f"Run `unset {variable}` to use the workspace's folder."))
    set_by = "exported" if any(map(os.environ.get, NNUNET_VARIABLES)) else "not exported; each command sets them itself"
    return checks or [Check("nnU-Net paths", "ok", set_by)]


def _external_trainers() -> Check:
    name = "nnUNet_extTrainer"
    folders = [Path(folder) for folder in os.environ.get(name, "").split(os.pathsep) if folder.strip()]
    to_shim = f"export {name}={SHIM_FOLDER}"
    packages = _package_folders()
    for folder in folders:
        resolved = folder.expanduser().resolve()
        holds_package = any(package.is_relative_to(resolved) for package in packages)
        if holds_package or resolved.name in ("site-packages", "dist-packages"):
            # nnU-Net imports all that lies there, then evicts it from sys.modules: classes lose their identity
            return Check(name, "problem", f"{folder} holds installed packages, which nnU-Net then breaks", to_shim)
        if not resolved.is_dir():
            return Check(name, "warning", f"{folder} is not a folder", to_shim)
    if SHIM_FOLDER in [folder.expanduser().resolve() for folder in folders]:
        return Check(name, "ok", "finds our trainers")
    found = "exported without our trainers" if folders else "not exported"
    return Check(name, "ok", f"{found}; diffseg adds them for itself, stock nnU-Net commands need `{to_shim}`")


def _package_folders() -> list[Path]:
    """Where diffseg_nnunet, its trainers and nnU-Net lie; none of them is imported for it."""
    specs = [find_spec(name) for name in ("diffseg_nnunet", "diffseg_nnunet.trainers", "nnunetv2")]
    return [Path(folder).resolve() for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def _processes() -> list[Check]:
    checks = []
    for variable, purpose, followed in (
        ("nnUNet_n_proc_DA", "augmentation", "cores and memory"),
        ("nnUNet_def_n_proc", "preprocessing and export", "cores"),
    ):
        text = os.environ.get(variable)
        mend = f"Run `unset {variable}`, or export 1 or more."
        if text is None:
            checks.append(Check(variable, "ok", f"not exported: {purpose} follows the usable {followed}"))
        elif not text.strip().isdecimal() or int(text) < 1:
            checks.append(Check(variable, "problem", f"exported as '{text}', with which nnU-Net fails", mend))
        elif int(text) > 2 * (cores := hardware.usable_cores()):
            checks.append(Check(variable, "warning", f"{text} processes for {purpose} on {cores} cores", mend))
        else:
            checks.append(Check(variable, "ok", f"{text} processes for {purpose}"))
    return checks


def _compile() -> Check:
    name, text = "nnUNet_compile", os.environ.get("nnUNet_compile")
    on = text is None or text.lower() in _TRUE
    if text is not None and text.lower() not in _TRUE + _FALSE:
        return Check(name, "warning", f"'{text}' means false to nnU-Net", f"export {name}=t or {name}=f")
    if gpus.no_gpu_reason() is not None:
        if text is not None and on:
            mend = f"Run `unset {name}`: compiled prediction is slower on the CPU."
            return Check(name, "warning", "exported as true, without a GPU", mend)
        return Check(name, "ok", "networks are not compiled on the CPU")
    if on and not hardware.has_c_compiler():
        finding = "torch.compile needs a C compiler, and none is found: training goes without it, slower"
        # where it is exported, nnU-Net's prediction compiles, too, and fails
        return Check(name, "warning" if text is None else "problem", finding, f"Install gcc, or export {name}=f.")
    return Check(name, "ok", "networks are compiled on the GPU" if on else "off: training on a GPU is slower")


def _shim() -> Check:
    module = SHIM_FOLDER / "diffseg_nnunet_trainers_shim.py"
    if not module.is_file():
        return Check("trainer shim", "problem", f"{module} is missing", "Install diffseg_nnunet again.")
    return Check("trainer shim", "ok", str(SHIM_FOLDER))


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.8.1+cu132' -> (2, 8, 1)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in leading[0].split(".")) if leading else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
