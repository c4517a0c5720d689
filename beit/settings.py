"""A command's settings: as TOML, in words, and held against those that a run folder was begun with.

The settings are the command's frozen dataclass. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Settings of how a run is carried out, not of what it learns: they may differ on resume. They change what
# it computes by rounding, and, where a step is divided or compiled otherwise, which paths stochastic depth
# drops (parts of a dVAE's step also by the age of its codes).
FREE_SETTINGS = {
    "out", "overwrite", "workers", "device", "log_every", "save_every", "keep_last",
    "keep_every", "device_batch_size", "shard", "gradient_checkpointing", "compile", "tensorboard",
    "peak_tflops", "probe_data", "probe_layers", "look_epochs", "max_bad_images",
}  # fmt: skip


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


def describe_settings(settings: Any) -> dict[str, Any]:
    """A command's dataclass as plain values, its name first; what is None is left out."""
    values = {"command": type(settings).__name__, **dataclasses.asdict(settings)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}


def as_typed(command: Any) -> str:
    """A command as it is typed, by the name of its settings."""
    return re.sub(r"\B[A-Z]", r"-\g<0>", str(command)).lower()


def command_line(settings: Any) -> str:
    """The command that gives these settings, as one would type it."""
    words = ["beit", as_typed(type(settings).__name__)]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "overwrite" or value == field.default:
            continue
        if field.name != "data":
            words.append("--" + "no-" * (value is False) + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            words += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def same_place(one: Any, other: Any) -> bool:
    """Whether two paths lead to the same place, one of them perhaps relative."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return Path(one).resolve() == Path(other).resolve()


def to_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's words, not JSON's
    # JSON's strings, but TOML knows no halves of characters and no bare delete.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def settings_in_words(settings: Any, unused: Collection[str] = ()) -> str:
    """A command's settings as they stand in run.toml, for people.

    unused: those that have no part in it, and are left out.
    """
    described = {k: v for k, v in describe_settings(settings).items() if k not in unused}
    command = as_typed(described.pop("command"))
    told = ", ".join(f"{k} {_toml_value(v)}" for k, v in described.items())
    return textwrap.fill(f"{command}: {told}", 108, break_long_words=False, break_on_hyphens=False)


def idle(settings: Any, unused: Collection[str]) -> str:
    """What is told of settings that were given though nothing here uses them; empty where none was."""
    given = [
        field.name
        for field in dataclasses.fields(settings)
        if field.name in unused and getattr(settings, field.name) != field.default
    ]
    return f"not used: {', '.join(given)}" if given else ""


def is_in_use(out: Path) -> bool:
    """Whether a run folder holds anything; not counted is what a process killed at its beginning left."""
    return any(not path.name.startswith(".run.toml.") for path in out.iterdir())


def check_spared(out: Path, settings: Any) -> None:
    """Refuse to begin again in a folder that holds what the command reads. Raises RunError."""
    folder = out.resolve()
    for key, value in vars(settings).items():
        if key == "out" or not isinstance(value, (str, Path)):
            continue
        place = Path(value)
        there = place.exists() or any(sign in str(value) for sign in "*?[")  # a pattern
        if there and folder in (place.resolve(), *place.resolve().parents):
            raise RunError(
                f"--overwrite would delete {value}, which this command reads, with all that is in {out}; "
                "choose another --out"
            )


def check_same(out: Path, settings: Any, complete: bool = True) -> list[str]:
    """Hold settings against those that a folder's run has; returns, in words, which paths have moved.

    complete: whether what only one of them has is compared too. Raises RunError.
    """
    file = out / "run.toml"
    if not file.exists():
        raise RunError(f"{out} is not empty and holds no run; choose another --out")
    try:
        before = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{file} is not TOML: {error}; --overwrite begins again") from error
    now = tomllib.loads(to_toml(describe_settings(settings)))
    if before.get("command") != now["command"]:
        raise RunError(
            f"{out} holds a run of beit {as_typed(before.get('command'))}, and this is beit "
            f"{as_typed(now['command'])}; choose another --out, or give --overwrite to begin again"
        )
    resolved = out / "resolved.toml"
    known = tomllib.loads(resolved.read_text(encoding="utf-8")) if resolved.exists() else {}
    moved = {key for key in now if f"{key}_hash" in known}  # `begin` compares what lies there
    paths = moved | {key for key, value in vars(settings).items() if isinstance(value, Path)}
    changed = {
        key: f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys() if complete else before.keys() & now.keys())
        if key not in FREE_SETTINGS
        and before.get(key) != now.get(key)
        and not (key in paths and same_place(before.get(key), now.get(key)))
    }
    if changed.keys() - moved:
        told = "; ".join(words for key, words in changed.items() if key not in moved)
        raise RunError(
            f"{out} holds a run with other settings ({told}). "
            "Use the same settings to go on with it, --overwrite to begin again, or another --out"
        )
    return list(changed.values())
