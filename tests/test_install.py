"""Each package works without the frameworks that it does not need: torch alone, jax alone, or neither."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "frontend_torch"}
JAX = {"jax", "jaxlib", "jax_triton", "frontend_jax"}
FOREIGN = {"kernels_triton": TORCH | JAX, "frontend_torch": JAX, "frontend_jax": TORCH}

# Imports a package and all its modules; with "hide", where nothing finds a foreign package, as if none was installed.
IMPORT_ALL = """
import importlib.util, pkgutil, sys

package, hide, *foreign = sys.argv[1:]

class HidesForeign:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in foreign else self.finder.find_spec(name, path, target)

if hide == "hide":
    sys.meta_path[:] = map(HidesForeign, sys.meta_path)
    for name in foreign:
        if importlib.util.find_spec(name):
            raise SystemExit(f"{name} was to be hidden")

def fail(name):
    raise

module = importlib.import_module(package)
for info in pkgutil.walk_packages(module.__path__, package + ".", onerror=fail):
    importlib.import_module(info.name)
    print(info.name)
imported = sorted(set(foreign) & set(sys.modules))
if imported:
    raise SystemExit(f"{package} imported {imported}")
"""


@pytest.mark.parametrize("hide", ["hide", "show"])
@pytest.mark.parametrize("package", FOREIGN)
def test_imports_without_foreign_packages(package, hide):
    command = [sys.executable, "-c", IMPORT_ALL, package, hide, *sorted(FOREIGN[package])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout, f"{package} has no modules"


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every absolute import, wherever it stands, and the name that import_module or __import__ is called with."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(level=0, module=str(name)):
                yield name
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in ("import_module", "__import__"):
                    yield name


@pytest.mark.parametrize("package", FOREIGN)
def test_names_no_foreign_package(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported_names(ast.parse(file.read_text()))
        if name.partition(".")[0] in FOREIGN[package]
    ]
    assert not found
