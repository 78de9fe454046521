"""`selector doctor`: what is installed here, what it reaches, and which combinations are known to go wrong."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import requires
from typing import ClassVar

from packaging.requirements import Requirement
from rich.table import Table

from selector.cli.command import Command, console

NEEDED_FOR = {
    "faiss": ("faiss-cpu", "searches in large pools; torch takes its place"),
    "trl": ("trl", "training with `selector demo` and inside TRL trainers"),
    "matplotlib": ("plots", "`selector plot`"),
}
"""Modules of the extras, by extra, and what does not work without them."""

COMPLETION = "selector --tyro-print-completion bash > ~/.local/share/bash-completion/completions/selector"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found here; a value of its own so that combinations can be tried without being installed."""

    versions: dict[str, str]
    """Installed version of each library."""
    cuda: str | None = None
    """CUDA version that torch was built with; None for a CPU build."""
    architectures: tuple[str, ...] = ()
    """GPU architectures that torch was built for, such as `sm_90`."""
    gpus: dict[str, str] = field(default_factory=dict)
    """Architecture of each GPU that torch reaches, by number and name."""
    has_nvidia_driver: bool = False
    """Whether the machine has an NVIDIA driver, whatever torch makes of it."""
    extras: frozenset[str] = frozenset()
    """Modules of extras that can be imported."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something that a person should know."""

    problem: bool
    """Whether it gives errors or wrong speed, rather than being a choice."""
    text: str
    """What is the matter."""
    fix: str
    """What to type."""


def diagnose(machine: Machine, requirements: list[str]) -> list[Remark]:
    """Compare a machine with what is known.

    Args:
        machine: what was found.
        requirements: of the package, as its metadata gives them.
    """
    found = []
    for requirement in map(Requirement, requirements):
        have = machine.versions.get(requirement.name)
        if have is not None and not requirement.specifier.contains(have, prereleases=True):
            text = f"{requirement.name} {have} is out of range, {requirement.specifier} is needed"
            found.append(
                Remark(problem=True, text=text, fix=f"pip install '{requirement.name}{requirement.specifier}'")
            )
    if {"faiss-cpu", "faiss-gpu"} <= set(machine.versions):
        text = "faiss-cpu and faiss-gpu overwrite each other's files"
        found.append(Remark(problem=True, text=text, fix="pip uninstall faiss-cpu faiss-gpu, then install one of them"))
    if machine.has_nvidia_driver and machine.cuda is None and "torch" in machine.versions:
        text = "there is an NVIDIA driver, but this torch is a CPU build"
        found.append(Remark(problem=True, text=text, fix="install torch with CUDA: https://pytorch.org/get-started"))
    if machine.has_nvidia_driver and machine.cuda is not None and not machine.gpus:
        text = f"torch for CUDA {machine.cuda} reaches no GPU: the driver is older, or CUDA_VISIBLE_DEVICES hides them"
        found.append(Remark(problem=True, text=text, fix="compare with the CUDA version that nvidia-smi prints"))
    for name, architecture in machine.gpus.items():
        # a build runs on later architectures of the same major version
        if not any(built[:-1] == architecture[:-1] and built <= architecture for built in machine.architectures):
            text = f"GPU {name} is {architecture}; this torch was built for {', '.join(machine.architectures)}"
            found.append(Remark(problem=True, text=text, fix="install a torch build for this GPU"))
    if machine.gpus and "triton" not in machine.versions:
        text = "without Triton spectra are solved by the library's slower routines"
        found.append(Remark(problem=False, text=text, fix="pip install triton"))
    if "liger-kernel" in machine.versions:
        text = "Liger's fused loss hides the loss of single samples; a model patched by it is refused"
        found.append(Remark(problem=False, text=text, fix="load the model without Liger when scoring"))
    for module, (extra, purpose) in NEEDED_FOR.items():
        if module not in machine.extras:
            found.append(
                Remark(
                    problem=False,
                    text=f"no {module}: needed for {purpose}",
                    fix=f"pip install 'gradient-selector[{extra}]'",
                )
            )
    return found


def inspect_machine() -> Machine:
    """What is installed here and reached from here."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    import torch

    from selector.runtime import versions

    found = versions()
    for name in ("peft", "triton", "liger-kernel", "deepspeed", "flash-attn", "jinja2", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = {}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        gpus[f"{i}: {torch.cuda.get_device_name(i)}"] = f"sm_{major}{minor}"
    return Machine(
        versions=found, cuda=torch.version.cuda, architectures=tuple(torch.cuda.get_arch_list()), gpus=gpus,
        has_nvidia_driver=shutil.which("nvidia-smi") is not None,
        extras=frozenset(module for module in NEEDED_FOR if find_spec(module) is not None),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(Command):
    """Show versions, GPUs and search engines, and say which combinations are known to go wrong.

    Example: selector doctor

    Ends with exit code 1 when something has to be put right.
    """

    name: ClassVar[str] = "doctor"

    def run(self) -> int:
        from importlib.metadata import PackageNotFoundError

        from selector.index.faiss_backend import installed

        machine = inspect_machine()
        out = console()
        table = Table("", "", show_header=False, title="this machine")
        table.add_row("python", f"{platform.python_version()}, {sys.executable}")
        table.add_row(
            "processors",
            f"{os.cpu_count()} cores, {platform.machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}",
        )
        table.add_row(
            "torch", f"{machine.versions['torch']}, {'CUDA ' + machine.cuda if machine.cuda else 'CPU build'}"
        )
        table.add_row(
            "GPUs",
            "\n".join(f"{name}, {architecture}" for name, architecture in machine.gpus.items())
            or "none that torch reaches",
        )
        reach = [device for device in ("cpu", "cuda") if "faiss" in machine.extras and installed(device)]
        table.add_row("FAISS searches on", ", ".join(reach) or "nothing: torch takes its place")
        table.add_row(
            "libraries", ", ".join(f"{name} {have}" for name, have in machine.versions.items() if name != "torch")
        )
        out.print(table)
        try:
            requirements = requires("gradient-selector") or []
        except PackageNotFoundError:  # run from a source tree
            requirements = []
        remarks = diagnose(machine, requirements)
        for remark in sorted(remarks, key=lambda remark: not remark.problem):
            out.print(
                f"{'problem' if remark.problem else 'note'}: {remark.text}\n  fix:     {remark.fix}", markup=False
            )
        problems = sum(remark.problem for remark in remarks)
        out.print(f"{problems} problems" if problems else "no problems found", markup=False)
        out.print(f"completion of words in the shell: {COMPLETION}", markup=False)
        return 1 if problems else 0
