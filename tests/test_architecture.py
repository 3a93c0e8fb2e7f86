"""Holds the rules of docs/architecture.md, "Who may know whom", and the house rules that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dsnet_jax"
MAX_LINES = 350

# Part of dsnet_jax -> the parts that it may import, itself aside. The leaves, which anyone may import, import nobody.
LEAVES = {"errors", "progress"}
MODEL = {"models", "ops"}
RUN = {"config", "data", "experiment", "workdir", "writing", "checkpoints", "parallel", "processes", "stopping"} | MODEL
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "config": set(),
    "variants": set(),
    "parallel": set(),
    "processes": set(),
    "stopping": set(),
    "integrity": set(),
    "writing": set(),
    "ops": set(),
    "models": {"ops"},
    "data": {"config", "writing"},
    "experiment": {"config", "data"} | MODEL,
    "workdir": {"config", "data", "writing"},
    "checkpoints": {"config", "integrity", "workdir"} | MODEL,
    "summary": {"config", "data", "experiment"} | MODEL,
    "weights": {"config", "data", "experiment", "workdir", "checkpoints", "writing"} | MODEL,
    "evaluation": RUN,
    "training": {"evaluation", "weights"} | RUN,
    "plan": {"training", "evaluation", "weights", "summary"} | RUN,
    "cli_inspect": {"summary", "evaluation", "training"} | RUN,
    "predictor": {"evaluation", "weights"} | RUN,
    "cli_export": {"evaluation", "weights"} | RUN,
    "cli": {"cli_inspect", "cli_export", "plan", "summary", "training", "evaluation", "weights"} | RUN,
    "__main__": {"cli"},
    "__init__": {"predictor"},  # Lazily, for dsnet_jax.load.
}

# Imports from outside that no part, or one part, may have.
FORBIDDEN_EVERYWHERE = {"tensorflow"}
FORBIDDEN_IN = {"ops": {"ml_collections", "flax.linen"}, "models": {"ml_collections"}, "parallel": {"ml_collections"}}


def imported_names(source: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and absolute dotted name of every import in `source`, inside functions too, relative ones resolved.

    `from a.b import c` gives "a.b.c", whether c is a module or not. `import_module` and `__import__` count when they
    are given a literal.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if function in {"import_module", "__import__"}:
                names.append((node.lineno, node.args[0].value))
    return sorted(names)


def part_of(module: str) -> str:
    """The part of dsnet_jax that a dotted name belongs to: dsnet_jax.data.specs -> data, dsnet_jax -> __init__."""
    return [*module.split("."), "__init__"][1]


def import_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `source` that the rules forbid, one line each."""
    part = part_of(module)
    if part not in MAY_IMPORT:
        return [f"{module}: {part} has no place in MAY_IMPORT"]
    faults = []
    for line, name in imported_names(source, module, is_package):
        if name.split(".")[0] == "dsnet_jax":
            allowed = part_of(name) in MAY_IMPORT[part] | {part} | (set() if part in LEAVES else LEAVES)
        else:
            forbidden = FORBIDDEN_EVERYWHERE | FORBIDDEN_IN.get(part, set())
            allowed = not any(f"{name}.".startswith(f"{other}.") for other in forbidden)
        if not allowed:
            faults.append(f"{module}:{line}: {part} may not import {name}")
    return faults


def missing_docstrings(source: str) -> list[str]:
    """Names of the public functions and classes at the top level of `source` that have no docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]


def modules_after(statement: str) -> set[str]:
    """The modules that a new interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(result.stdout.split())


def _files() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files, f"no Python files under {PACKAGE}"
    return files


def _module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_part_imports_what_it_may_not_know():
    faults = []
    for file in _files():
        faults += import_faults(file.read_text(), _module_name(file), is_package=file.name == "__init__.py")
    assert not faults, "\n".join(faults)


def test_the_import_rule_has_no_circle():
    reached = {part: set(known) for part, known in MAY_IMPORT.items()}
    for _ in MAY_IMPORT:
        reached = {part: known.union(*(reached[other] for other in known)) for part, known in reached.items()}
    assert [part for part, known in reached.items() if part in known] == []


def test_no_file_is_longer_than_can_be_read_in_one_sitting():
    lengths = {str(file): len(file.read_text().splitlines()) for file in _files()}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_every_public_function_and_class_has_a_docstring():
    missing = {str(file): missing_docstrings(file.read_text()) for file in _files()}
    assert {file: names for file, names in missing.items() if names} == {}


def test_there_is_no_utils_file():
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("configs", "scripts", "tests"))]
    files = [file.relative_to(folder) for folder in folders for file in folder.rglob("*.py")]
    assert [file for file in files if "utils" in file.with_suffix("").parts] == []


def test_the_command_line_starts_without_importing_jax():
    assert "jax" not in modules_after("import dsnet_jax.cli")


# The checker itself, on made-up sources.


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsnet_jax.ops.resize", "import dsnet_jax.models.layers"),
        ("dsnet_jax.ops.resize", "from dsnet_jax.config import default_config"),
        ("dsnet_jax.ops.resize", "from flax import linen as nn"),
        ("dsnet_jax.models.aspp", "from ml_collections import ConfigDict"),
        ("dsnet_jax.models.aspp", "import ml_collections"),
        ("dsnet_jax.models.aspp", "from dsnet_jax import config"),
        ("dsnet_jax.models.aspp", "from .. import config"),
        ("dsnet_jax.models.aspp", "from ..config import default_config"),
        ("dsnet_jax.models.aspp", "def f():\n    from dsnet_jax.experiment import Experiment"),
        ("dsnet_jax.models.aspp", "if TYPE_CHECKING:\n    import dsnet_jax.checkpoints"),
        ("dsnet_jax.data.specs", "from dsnet_jax import parallel"),
        ("dsnet_jax.data.specs", "import dsnet_jax.ops.extent"),
        ("dsnet_jax.parallel", "from dsnet_jax.config import default_config"),
        ("dsnet_jax.errors", "from dsnet_jax import progress"),
        ("dsnet_jax.checkpoints", "from dsnet_jax import experiment"),
        ("dsnet_jax.weights.export", "from dsnet_jax.evaluation.inference import predict"),
        ("dsnet_jax.evaluation.metrics", "from dsnet_jax.training import losses"),
        ("dsnet_jax.training.loop", "from dsnet_jax import cli"),
        ("dsnet_jax.training.loop", "from dsnet_jax import load"),
        ("dsnet_jax.training.loop", "from dsnet_jax import *"),
        ("dsnet_jax.training.loop", "import importlib; importlib.import_module('dsnet_jax.plan')"),
        ("dsnet_jax.cli", "import dsnet_jax"),
        ("dsnet_jax.cli", "import tensorflow as tf"),
        ("dsnet_jax.data.pipeline", "def f():\n    from tensorflow.io import gfile"),
        ("dsnet_jax.helpers", ""),
    ],
)
def test_the_checker_finds_a_forbidden_import(module, source):
    assert len(import_faults(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsnet_jax.models.aspp", "from dsnet_jax.ops.resize import resize_bilinear\nfrom .layers import Conv"),
        ("dsnet_jax.models.aspp", "from flax import linen as nn\nfrom ..ops import extent\nfrom . import layers"),
        ("dsnet_jax.ops.extent", "import flax.struct\nfrom dsnet_jax.errors import InputError"),
        ("dsnet_jax.parallel", "import jax\nfrom dsnet_jax.errors import InputError"),
        ("dsnet_jax.data.pipeline", "import tensorflow_datasets as tfds\nfrom dsnet_jax import config, progress"),
        ("dsnet_jax.evaluation.inference", "from dsnet_jax.data import pipeline\nimport dsnet_jax.parallel"),
        ("dsnet_jax.cli", "def main():\n    from dsnet_jax.training.loop import train"),
        ("dsnet_jax.__main__", "from dsnet_jax.cli import main"),
        ("dsnet_jax", "def load(path):\n    from .predictor import Predictor"),
    ],
)
def test_the_checker_passes_an_allowed_import(module, source):
    assert import_faults(source, module, is_package=module == "dsnet_jax") == []


def test_the_checker_resolves_relative_imports_by_where_the_file_stands():
    source = "from . import a\nfrom .b import c\nfrom .. import d"
    in_file = [(1, "dsnet_jax.models.a"), (2, "dsnet_jax.models.b.c"), (3, "dsnet_jax.d")]
    assert imported_names(source, "dsnet_jax.models.aspp") == in_file
    assert imported_names(source, "dsnet_jax.models", is_package=True) == in_file


def test_the_checker_names_what_lacks_a_docstring_and_passes_what_is_private():
    source = 'def f(): pass\nclass C: x = 1\nasync def g(): pass\ndef h():\n    "says"\ndef _private(): pass'
    assert missing_docstrings(source) == ["f", "C", "g"]


def test_the_probe_of_a_new_interpreter_sees_what_was_imported():
    assert "colorsys" in modules_after("import colorsys")
    assert "colorsys" not in modules_after("pass")
