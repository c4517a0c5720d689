"""The house: imports only go down, torch comes late, a file is named for the one thing it holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

import beit

PACKAGE = Path(beit.__file__).parent

# docs/architecture.md; files that are not written yet have their floor already.
FLOORS = {
    7: {"beit"},  # the public names, imported from everywhere and by nobody
    6: {"cli", "__main__"},
    5: {"commands"},  # and every file in it
    4: {"labelled", "frozen", "validation", "classifier_report", "label_review", "finetune_defaults",
        "finetune_report", "watch"},
    3: {"engine", "probe", "report", "split", "faiss_index", "run",
        "torch_model"},
    2: {"features", "export", "checkpoints", "data", "visualize", "embeddings", "training", "tally",
        "graph_cache", "tokenizer_files"},
    1: {"vqkd", "augment", "unpickle", "hub", "layouts", "configs", "handover", "distributed",
        "listing", "snapshots", "flops", "duplicates", "graphs", "folded", "any_size", "weight_files",
        "recipes"},
    0: {"model", "relative_position", "tokenizer", "masking", "image", "metrics", "optim", "precision",
        "atomic", "ranges", "names", "plural", "workers", "stop", "criterion", "settings",
        "progress", "folder_lock", "cache"},
}  # fmt: skip
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

# Steps on one floor, and why each is no loop.
SIDEWAYS = {
    ("model", "relative_position"): "the bias table is a part of the model, in a file of its own",
    ("handover", "layouts"): "the names say why a tensor is left behind",
    ("configs", "layouts"): "files and tensors give the same ratio for the same sizes",
    ("weight_files", "graphs"): "a graph is no file of weights",
    ("weight_files", "unpickle"): "pickles are files of weights too",
    ("checkpoints", "tokenizer_files"): "`load` reads either",
    ("training", "tally"): "a checkpoint holds it too",
    ("model", "image"): "a model carries the ImageSpec that its weights expect",
    ("finetune_defaults", "labelled"): "they are chosen from the pictures",
    ("label_review", "classifier_report"): "the labels that look wrong stand on the page",
    ("label_review", "frozen"): "features that were not trained judge best",
    ("label_review", "labelled"): "what is judged",
    ("finetune_report", "classifier_report"): "its sections stand on the page",
    ("finetune_report", "frozen"): "what came of the head",
    ("finetune_report", "label_review"): "its section stands on the page",
    ("finetune_report", "labelled"): "what was learned",
    ("finetune_report", "validation"): "the looks are a curve",
    ("watch", "frozen"): "a look is at what a head on frozen blocks would get",
    ("engine", "torch_model"): "torch is one of its runtimes",
    ("export", "features"): "an exported graph pools as features are pooled",
    ("__main__", "cli"): "`python -m beit` is `beit`",
    ("commands.bench_pretrain", "commands.pretrain"): "it times what `pretrain` does",
    ("commands.demo", "commands.finetune"): "the demo's work is to run the other commands",
    ("commands.demo", "commands.pretrain"): "the demo's work is to run the other commands",
    ("commands.demo", "commands.probe"): "the demo's work is to run the other commands",
    ("commands.demo", "commands.train_tokenizer"): "the demo's work is to run the other commands",
}


def files_of(package: Path) -> dict[str, Path]:
    """{"model": .../model.py, "commands.probe": ..., "beit": .../__init__.py}."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or "beit"] = file
    return found


def floor_of(name: str) -> int | None:
    return FLOOR_OF.get(name.split(".")[0])


def imports_of(file: Path, names: set[str]) -> set[str]:
    """Which files of the package a file imports, also late, in functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write `from beit.…`"
            # `from beit import model` names a file as `from beit.model import Beit` does.
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for dotted in wanted:
            parts = dotted.split(".")
            if parts[0] != "beit":
                continue
            inside = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((name for name in inside if name in names), "beit"))
    return found


def wrong_imports(package: Path) -> list[str]:
    files = files_of(package)
    wrong = []
    for name, file in files.items():
        if floor_of(name) is None:
            wrong.append(f"{name} has no floor")
            continue
        for imported in sorted(imports_of(file, set(files))):
            above, below = floor_of(name), floor_of(imported)
            assert above is not None
            if below is None or (below >= above and (name, imported) not in SIDEWAYS):
                wrong.append(f"{name} (floor {above}) imports {imported} (floor {below})")
    return wrong


def test_imports_only_go_down() -> None:
    assert not wrong_imports(PACKAGE)


def test_every_allowed_step_sideways_is_taken() -> None:
    files = files_of(PACKAGE)
    for name, imported in SIDEWAYS:
        assert imported in imports_of(files[name], set(files)), f"{name} no longer imports {imported}"
        assert floor_of(name) == floor_of(imported)


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("image.py", "from beit.engine import Engine", "image (floor 0) imports engine (floor 3)"),
        ("data.py", "import beit.export", "data (floor 2) imports export (floor 2)"),
        ("image.py", "import beit.masking", "image (floor 0) imports masking (floor 0)"),
        ("data.py", "from beit import run", "data (floor 2) imports run (floor 3)"),
        ("data.py", "def f():\n    from beit.cli import app", "data (floor 2) imports cli (floor 6)"),
        ("data.py", "from beit import load", "data (floor 2) imports beit (floor 7)"),
        (
            "commands/a.py",
            "from beit.commands.b import b",
            "commands.a (floor 5) imports commands.b (floor 5)",
        ),
        ("attic.py", "", "attic has no floor"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    (tmp_path / "commands").mkdir()
    for name in ("__init__", "engine", "masking", "run", "cli", "commands/b", "image", "data", "export"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / file).write_text(line + "\n")
    assert wrong_imports(tmp_path) == [complaint]


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    for name in files_of(PACKAGE):
        last = name.split(".")[-1].strip("_")
        assert last not in {"util", "utils", "common", "helper", "helpers", "misc", "base"}, name


@pytest.mark.parametrize("name", files_of(PACKAGE))
def test_every_file_says_what_it_is_on_its_door(name: str) -> None:
    text = files_of(PACKAGE)[name].read_text()
    assert not text or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


def runs_without_torch(code: str) -> None:
    """Run code in a fresh process in which importing torch fails."""
    barred = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", barred + code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_imports_torch_is_seen() -> None:
    with pytest.raises(AssertionError, match="torch"):
        runs_without_torch("import beit.model")


@pytest.mark.parametrize("name", ["beit", "beit.image", "beit.masking", "beit.cli", "beit.metrics"])
def test_import_does_not_wait_for_torch(name: str) -> None:
    runs_without_torch(f"import {name}")


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"]])
def test_the_command_line_says_what_it_can_without_torch(words: list[str]) -> None:
    runs_without_torch(f"sys.argv[1:] = {words!r}\nfrom beit.cli import main\nmain()")


def test_public_numpy_parts_work_without_torch() -> None:
    runs_without_torch(
        "import beit, numpy as np\n"
        "beit.preprocess(np.zeros((9, 9, 3), np.uint8), beit.ImageSpec())\n"
        "beit.sample_mask((14, 14), 75, np.random.default_rng(0))"
    )
