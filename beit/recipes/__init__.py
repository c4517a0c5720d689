"""Recipes: the settings of each published result, and ours for small data, one TOML file a result.

    expected = "86.8 top-1, 98.1 top-5"     what came out where it was published
    source = "the authors' published commands"
    cost = "..."                            on what, for how long, where that is known
    [settings]                              fields of the command, by name

`--recipe NAME` starts from one, flags override it; `--config run.toml` starts from a run's own settings.
No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from beit.settings import as_typed

FOLDER = Path(__file__).parent
TOLD = {"expected", "source", "cost"}  # to people, above [settings]


def recipe_names(command: str) -> list[str]:
    """The recipes of a command, such as `pretrain`."""
    return sorted(file.stem for file in (FOLDER / command.replace("-", "_")).glob("*.toml"))


def find_recipe(command: str, name: str) -> Path:
    """The file of a recipe by its name, or a .toml of one's own. Raises ValueError."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ValueError(f"recipe {name} does not exist")
        return Path(name)
    known = recipe_names(command)
    if name not in known:
        raise ValueError(f"`beit {command}` has no recipe {name!r}; {nearest(name, known)}")
    return FOLDER / command.replace("-", "_") / f"{name}.toml"


def read_settings(file: Path, command: type[Any]) -> dict[str, Any]:
    """The settings of a recipe, or of a run.toml; a key that is no field of the command is an error."""
    fields = {field.name for field in dataclasses.fields(command)}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    values = content.get("settings", content)
    if values is not content:
        for key in content.keys() - TOLD - {"settings"}:
            raise ValueError(f"{file} has {key!r} outside [settings]; {nearest(key, {*TOLD, *fields})}")
    settings = dict(values)
    if (of := settings.pop("command", command.__name__)) != command.__name__:
        raise ValueError(
            f"{file} is of beit {as_typed(of)}, and this is beit {as_typed(command.__name__)}; "
            "give the run.toml of one"
        )
    for key in settings:
        if key not in fields:
            raise ValueError(f"{file} sets {key!r}, which is no setting; {nearest(key, fields)}")
    return settings


def nearest(word: str, known: Collection[str]) -> str:
    """What a misspelt word may have meant, for an error."""
    if not known:
        return "it has none"
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(sorted(known))}"
