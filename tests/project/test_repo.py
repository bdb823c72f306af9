"""Rules about the source itself: who imports whom, file length, docstrings."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import s2sam_jax

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "s2sam_jax").rglob("*.py"))
METHODS = [path for path in CORE if path.parent.name == "methods" and path.name != "__init__.py"]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


# Each of these folders of the core may import those before it; methods, training and analysis all three.
FOUNDATIONS = ["_base", "_sharpness", "_sparsity"]
FOLDERS = [*FOUNDATIONS, "methods", "_training", "analysis"]


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth: modules, and ``module.name`` for from-imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def under(names: set[str], *packages: str) -> list[str]:
    return sorted(name for name in names if any(name == p or name.startswith(p + ".") for p in packages))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_is_free_of_its_hosts(path):
    assert not under(imports(path), "flax", "chex", "equinox", "experiments", "jax._src", "tests")
    roots = {name.split(".")[0] for name in imports(path)} - {"jax", "optax", "numpy", "s2sam_jax"}
    assert all(root in sys.stdlib_module_names for root in roots), roots


@pytest.mark.parametrize("path", [path for path in CORE if path.parent.name in FOLDERS], ids=relative)
def test_folders_import_none_that_is_above_them(path):
    folder = path.parent.name
    below = FOUNDATIONS[: FOUNDATIONS.index(folder)] if folder in FOUNDATIONS else FOUNDATIONS
    found = {name.split(".")[1] for name in imports(path) if name.startswith("s2sam_jax.")}
    assert found <= {*below, folder}


@pytest.mark.parametrize("path", METHODS, ids=relative)
def test_methods_import_neither_each_other_nor_the_transformations(path):
    assert not under(imports(path), "s2sam_jax.methods", "s2sam_jax._sharpness", "s2sam_jax._sparsity.sparsify")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("oracles*.py")), ids=relative)
def test_oracles_know_nothing_of_the_package(path):
    assert not under(imports(path), "s2sam_jax", "jax", "optax", "experiments")


@pytest.mark.parametrize("path", [*CORE, *EXPERIMENTS, *TESTS], ids=relative)
def test_file_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 300, f"{lines} lines"


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_no_assert_and_no_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise ValueError or TypeError instead"
        printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printed, f"line {node.lineno}: print"


PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (s2sam_jax, s2sam_jax.methods, s2sam_jax.analysis)
    for name, value in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text, "no docstring"
    if not inspect.isfunction(value):
        return
    assert "\nExample:\n" in text, "no Example section"
    assert ">>> " in text, "no doctest"
    returns = "\nReturns:\n" in text or "\nYields:\n" in text
    assert returns or inspect.signature(value).return_annotation is None, "no Returns section"
    assert "\nArgs:\n" in text or not inspect.signature(value).parameters, "no Args section"
    if "\nArgs:\n" in text:
        section = text.split("\nArgs:\n")[1].split("\n\n")[0]
        for parameter in inspect.signature(value).parameters:
            assert f"\n  {parameter}:" in "\n" + section or f"\n  **{parameter}:" in "\n" + section, (
                f"{parameter} is not explained"
            )


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_methods_say_what_they_return(path):
    """Otherwise their class is partly unknown to whoever checks types against an installed package."""
    for owner in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                assert node.returns, f"{owner.name}.{node.name}"


def test_every_module_has_a_docstring_and_every_public_function_annotations():
    for path in [*CORE, *EXPERIMENTS]:
        text = path.read_text()
        assert not text or ast.get_docstring(ast.parse(text)), f"{relative(path)} has no docstring"
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            assert not missing, f"{name}: {missing}"
            assert signature.return_annotation is not signature.empty, name
