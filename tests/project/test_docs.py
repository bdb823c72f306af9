"""The documentation names what exists, all of it, and nothing else."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import s2sam_jax

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*") if page.suffix in (".md", ".rst"))
MODULES = (s2sam_jax, s2sam_jax.methods, s2sam_jax.analysis)


LISTED = [
    name for page in PAGES for name in re.findall(r"^\.\. auto(?:function|class):: (\S+)", page.read_text(), re.M)
]


def public(module):
    return {name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)}


def exists(name):
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


def relative(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_its_entry(module):
    missing = {f"{module.__name__}.{name}" for name in public(module)} - set(LISTED)
    assert not missing, f"add these to a page in docs/api: {sorted(missing)}"


def test_every_entry_exists_and_stands_once():
    assert [name for name in LISTED if not exists(name)] == []
    assert len(LISTED) == len(set(LISTED))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_on_a_page_exist(page):
    text = page.read_text()
    named = set(re.findall(r"<(s2sam_jax\.[\w.]+)>", text))
    named |= {f"s2sam_jax.{name}" for name in re.findall(r"(?<![\w.])((?:methods|analysis)\.\w+)(?=\()", text)}
    assert sorted(name for name in named if not exists(name)) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_imports_and_files_on_a_page_exist(page):
    text = page.read_text()
    for names in re.findall(r"^>>> from s2sam_jax import (.+)$", text, re.M):
        assert all(hasattr(s2sam_jax, name) for name in names.split(", ")), names
    links = re.findall(r"\]\(((?!https?:)[^)#]*)[^)]*\)", text)
    assert [link for link in links if link and not (page.parent / link).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_lines_are_short(page):
    prose = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 120] == []


def test_the_changelog_knows_the_version():
    assert re.search(rf"^## {re.escape(s2sam_jax.__version__)}\b", (DOCS / "changelog.md").read_text(), re.M)
