"""Settings as TOML."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from beit.settings import describe_settings, to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


VALUES: list[Any] = [
    *(0, -3, 10**12, 1.5, 1e-6, 1e22, 4e-3, 0.1 + 0.2, math.inf, -math.inf, True, False),
    *("", "a b", "é 猫 🐈", 'say "no"\\n', "tab\tline\n", "\x7f\x01"),
    *([], [0.9, 0.98], [1.0, math.inf], ["a", "b"], [True]),
]


@pytest.mark.parametrize("value", VALUES)
def test_settings_come_back_from_toml_as_they_went(value: Any) -> None:
    assert tomllib.loads(to_toml({"key": value, "last": 1})) == {"key": value, "last": 1}


def test_every_commands_settings_come_back_from_toml() -> None:
    from beit.commands.demo import Demo
    from beit.commands.finetune import Finetune
    from beit.commands.pretrain import Pretrain
    from beit.commands.train_tokenizer import TrainTokenizer

    path = Path("/pictures/mit Leerzeichen \\ und ü")
    for settings in (
        Demo(),
        Finetune(path, model="m", out=path, val=path),
        Pretrain(path, tokenizer=path, out=path, img_size=64),
        TrainTokenizer(path, out=path),
    ):
        described = describe_settings(settings)
        assert tomllib.loads(to_toml(described)) == json.loads(json.dumps(described))
        assert described["command"] == type(settings).__name__
        assert None not in described.values()
