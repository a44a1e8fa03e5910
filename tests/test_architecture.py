"""Who may import whom, and how long things may be: docs/architecture.md, checked on the source."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for path in [*ROOT.glob("*.py"), *(ROOT / "network").rglob("*.py"), *(ROOT / "data_util").rglob("*.py")]
    if path.name != "__init__.py"
)
SCRIPTS = {
    "train",
    "training_callbacks",
    "eval",
    "demo",
    "apply",
    "register",
    "registration",
    "registration_options",
    "views",
    "pack",
}
_COMMANDS = ("build", "check", "download", "learn2reg", "phantoms", "report", "sample", "starter_data")
COMMANDS = {f"data_util.{name}" for name in _COMMANDS}
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports_of(path):
    """Modules of this project that a file imports, at its top or inside functions."""
    package = name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in MODULES or name == "network"}
    return found - {name_of(path)}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room(name):
    """The folder of a module: 'network', 'data_util', 'data_util.scans', ..., or '' for a file at the top."""
    return name.rpartition(".")[0]


def offenders(test):
    return [f"{name} imports {other}" for name, others in IMPORTS.items() for other in others if test(name, other)]


def test_the_source_is_seen():
    assert len(MODULES) > 50
    assert "network.losses" in IMPORTS["network.training"]
    assert "data_util.scans.frame" in IMPORTS["registration"]


_STARTS = (("start", "network"), ("start", "kernel_cache"))


@pytest.mark.parametrize(
    ("rule", "test"),
    [
        (
            "network and data_util never import each other",
            lambda a, b: {a.split(".")[0], b.split(".")[0]} == {"network", "data_util"},
        ),
        ("nobody imports a command", lambda a, b: b in COMMANDS),
        ("only scripts import a script", lambda a, b: b in SCRIPTS and a not in SCRIPTS),
        ("errors, published and checksums import nothing", lambda a, b: a in ("errors", "published", "checksums")),
        ("files and checked import errors alone", lambda a, b: a in ("files", "checked") and b != "errors"),
        (
            "cli imports errors, start and files alone, and devices cli, errors, start and workers",
            lambda a, b: (
                b
                not in {"cli": ("errors", "start", "files"), "devices": ("cli", "errors", "start", "workers")}.get(
                    a, (b,)
                )
            ),
        ),
        (
            "start imports network and kernel_cache alone, and progress nothing",
            lambda a, b: a in ("start", "progress") and (a, b) not in _STARTS,
        ),
        (
            "kernel_cache imports checksums and files alone",
            lambda a, b: a == "kernel_cache" and b not in ("checksums", "files"),
        ),
        ("workers imports cli and errors alone", lambda a, b: a == "workers" and b not in ("cli", "errors")),
        (
            "a raw scan knows nothing of data sets",
            lambda a, b: (
                room(a) == "data_util.scans"
                and room(b) != "data_util.scans"
                and b not in ("errors", "files", "checked", "progress", "data_util.grey_values")
            ),
        ),
        (
            "what is written knows nothing of making and reading data sets",
            lambda a, b: room(a) == "data_util.output" and (room(b) == "data_util.making" or b == "data_util.store"),
        ),
        (
            "the data set's own files know nothing of making data sets and of output",
            lambda a, b: (
                room(a) == "data_util" and a not in COMMANDS and room(b) in ("data_util.making", "data_util.output")
            ),
        ),
    ],
)
def test_who_may_import_whom(rule, test):
    assert offenders(test) == [], rule


def test_no_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


def functions():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_no_long_function_and_no_long_file():
    long = []
    for path, node in functions():
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        length = body[-1].end_lineno - body[0].lineno + 1
        if length > LONGEST_FUNCTION:
            long.append(f"{name_of(path)}.{node.name}: {length} lines")
    long += [
        f"{name_of(path)}: {n} lines" for path in SOURCES if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    ]
    assert long == []


def test_a_flag_and_a_mistake_need_no_tensorflow():
    """Every command's --help, and each import of data_util's commands, comes without TensorFlow."""
    code = "import sys, {0}; sys.exit('tensorflow' in sys.modules)"
    for module in ("train", "eval", "demo", "apply", *sorted(COMMANDS)):
        done = subprocess.run(["python3", "-c", code.format(module)], cwd=ROOT, env=_environment(), check=False)
        assert done.returncode == 0, module


def _environment():
    import os
    import sys

    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def test_public_things_are_documented():
    bare = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
                is_named = isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and not inner.name.startswith("_")
                if is_named and not ast.get_docstring(inner) and not _overrides(inner.name):
                    bare.append(f"{name_of(path)}.{inner.name}")
    assert bare == []


def _overrides(name):
    """Whether a method overrides one of a library, and does what its name says."""
    keras = {"call", "build", "get_config", "from_config", "compute_output_shape", "make_train_function", "train_step"}
    return name in keras | {"convolution_op", "checked"} or name.startswith("on_")
