"""The architecture, where it is enforced: who may import whom, what an import costs, what a wheel holds."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS = {
    0: ("errors", "types", "registry", "runtime"),
    1: ("config", "neighbours", "assets", "store.schema"),
    2: ("data", "store", "spectra"),
    3: ("batching", "selection", "index", "scores", "sampling.order"),
    4: ("gradients", "policies", "sampling"),
    5: ("selecting", "export", "forward"),
    6: ("scorer", "report", "testing"),
    7: ("integrations", "plots"),
    8: ("cli",),
    9: ("__main__",),
}
"""A file imports only from lower levels or from its own package (level 0 also within itself). Nothing to the left of the data flow knows what is to its right."""

ONLY_IN = {
    "faiss": ("selector.index.faiss_backend",),
    "trl": ("selector.integrations", "selector.cli.demo"),
    "matplotlib": ("selector.plots",),
    "tyro": ("selector.cli", "selector.config"),  # settings carry their names and help on the command line
    "rich": ("selector.cli",),
    "jinja2": ("selector.report",),
}
"""Libraries that one room alone may import, at whatever depth of a function."""

ONLY_STANDARD = {"numpy", "jaxtyping"}
"""What level 0 may import besides the standard library."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in (("selector", "selector"), ("integrations", "selector.integrations")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports for use at run time, wherever it does so."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def level(module: str) -> int | None:
    """Level of a module by the longest name of the table that it begins with; None for what the table leaves free."""
    name = module.removeprefix("selector").removeprefix(".")
    matches = [
        (len(part), number)
        for number, parts in LEVELS.items()
        for part in parts
        if name == part or name.startswith(part + ".")
    ]
    return max(matches)[1] if matches else None


def room(module: str) -> str:
    """Package in which imports are free: the first part below `selector`."""
    return module.split(".")[1] if "." in module else ""


def direction_faults(module: str, imported: set[str]) -> list[str]:
    """What a module imports although it must not."""
    own = level(module)
    faults = []
    for name in imported:
        if name.startswith("selector.") and room(name) != room(module):
            other = level(name)
            if own is not None and other is not None and other >= max(own, 1):
                faults.append(f"{module} (level {own}) imports {name} (level {other})")
        library = name.split(".")[0]
        if library in ONLY_IN and not module.startswith(ONLY_IN[library]):
            faults.append(f"{module} imports {library}, which belongs to {', '.join(ONLY_IN[library])}")
        if own == 0 and library not in ONLY_STANDARD | {"selector"} | set(sys.stdlib_module_names):
            faults.append(f"{module} (level 0) imports {library}")
    return faults


def test_every_module_has_a_level():
    free = {"selector"}
    assert [name for name in modules() if name not in free and level(name) is None] == []


def test_imports_go_one_way():
    assert [fault for name, path in modules().items() for fault in direction_faults(name, imports(path))] == []


@pytest.mark.parametrize(
    ("module", "imported", "word"),
    [
        ("selector.types", "selector.config.ScoreConfig", "level"),
        ("selector.data.load", "selector.scorer", "level"),
        ("selector.scores.length", "faiss", "belongs to"),
        ("selector.errors", "torch", "level 0"),
    ],
)
def test_the_direction_test_sees_a_wrong_import(module, imported, word):
    assert any(word in fault for fault in direction_faults(module, {imported}))


HEAVY = ("torch", "transformers", "faiss", "trl", "datasets", "matplotlib", "pyarrow", "numpy")


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after some code."""
    report = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_free():
    assert loaded_by("import selector") == set()


def test_help_loads_neither_models_nor_indices():
    found = loaded_by("import selector.cli")
    assert not found & {"torch", "transformers", "faiss", "trl", "datasets", "matplotlib"}


def test_the_import_test_sees_a_heavy_import():
    assert "numpy" in loaded_by("import selector\nselector.Scores")


def test_every_public_name_can_be_loaded():
    import selector

    for name in selector.__all__:
        assert getattr(selector, name).__name__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = selector.nothing


def test_packages_are_listed():
    """setuptools is told every package by hand, so a new one is forgotten easily."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(packages)


def test_wheel_installs_elsewhere_and_imports(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a copy, because setuptools builds in place and would keep files that are gone
    for folder in ("selector", "integrations"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("gradient_selector-*.whl")
    assert wheel.stat().st_size < 12e6
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "selector/py.typed",
        "selector/assets/pool.jsonl",
        "selector/assets/tiny/model.safetensors",
        "selector/integrations/__init__.py",
    ):
        assert needed in names
    assert not any(name.startswith(("tests/", "benchmarks/", "recipes/", "integrations/")) for name in names)
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = "import selector, selector.integrations, selector.assets; print(selector.__file__); assert selector.assets.TINY_MODEL.is_dir()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().startswith(str(tmp_path))
