"""The names a user meets: they exist, agree with each other, and say what they are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import beit

PACKAGE = Path(beit.__file__).parent
TREES = {
    str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))
}


def names_for_type_checkers() -> dict[str, set[str]]:
    """{place: names} of the imports under `if TYPE_CHECKING` of beit/__init__.py."""
    found: dict[str, set[str]] = {}
    for node in TREES["__init__.py"].body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                found[str(line.module)] = {alias.name for alias in line.names}
    return found


@pytest.mark.parametrize("name", beit.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(beit, name) is not None


def test_public_names_are_those_of_the_table_and_of_the_type_checker() -> None:
    table = {place: set(names) for place, names in beit._PLACES.items()}
    assert table == names_for_type_checkers()
    listed = [name for names in beit._PLACES.values() for name in names]
    assert sorted([*listed, "__version__"]) == sorted(beit.__all__)
    assert len(set(beit.__all__)) == len(beit.__all__)
    assert dir(beit) == sorted(beit.__all__)


def test_a_public_name_is_the_object_of_its_place() -> None:
    for place, names in beit._PLACES.items():
        for name in names:
            assert getattr(beit, name) is getattr(importlib.import_module(place), name)


def test_an_unknown_name_is_an_attribute_error_that_says_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'BeitForSpeech'"):
        _ = beit.BeitForSpeech  # type: ignore[attr-defined]


def test_version_is_that_of_the_installed_package() -> None:
    assert beit.__version__ == version("beit")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", beit.__version__)


@pytest.mark.parametrize("name", [n for n in beit.__all__ if n not in ("__version__", "VARIANTS")])
def test_every_public_object_says_what_it_is(name: str) -> None:
    thing = getattr(beit, name)
    assert thing.__doc__, f"{name} has no docstring"
    assert not thing.__doc__.startswith(f"{name}("), f"{name} has only the dataclass's own docstring"
    if inspect.isclass(thing):
        assert thing.__doc__ not in [base.__doc__ for base in thing.__mro__[1:]]


# Said once, at the promise or at the class; the second copy would lie.
SAID_BY_TORCH = {"forward", "train"}
SAID_BY_TOKENIZER = {name for name in vars(beit.Tokenizer) if not name.startswith("_")}


def without_docstring(tree: ast.Module) -> list[str]:
    """Public classes, functions and methods that lack a docstring; an override has its base's."""
    found = []
    said_by: dict[str, set[str]] = {}
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if not (node.name.startswith("_") or ast.get_docstring(node) or described_by_its_fields(node)):
            found.append(node.name)
        if not isinstance(node, ast.ClassDef):
            continue
        said = SAID_BY_TORCH | SAID_BY_TOKENIZER
        for base in node.bases:
            said = said | said_by.get(ast.unparse(base), set())
        methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
        said = said | {method.name for method in methods if ast.get_docstring(method)}
        said_by[node.name] = said
        names = [method.name for method in methods if not method.name.startswith("_")]
        if not node.name.startswith("_"):
            found += [f"{node.name}.{name}" for name in names if name not in said]
    return found


def described_by_its_fields(node: ast.AST) -> bool:
    """A command's settings: the first field, the data it works on, has its line of help."""
    if not isinstance(node, ast.ClassDef) or not node.decorator_list:
        return False
    return "Parameter(name='*')" in [ast.unparse(decorator) for decorator in node.decorator_list]


@pytest.mark.parametrize("file", TREES)
def test_every_public_function_and_method_says_what_it_does(file: str) -> None:
    missing = without_docstring(TREES[file])
    assert not missing, f"{file} has no docstring for {', '.join(missing)}"


def test_a_missing_docstring_is_seen() -> None:
    code = "def f(): pass\nclass A:\n    'a'\n    def g(self): pass\n    def _h(self): pass\n"
    code += "    def i(self):\n        'said'\nclass B(A):\n    'b'\n    def i(self): pass\n"
    assert without_docstring(ast.parse(code)) == ["f", "A.g"]
