"""The command line: help with an example, errors on stderr with their codes, nothing slow."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import os
import platform
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, Cli

import beit.cli
import beit.commands.pretrain
import beit.listing
from beit.atomic import CannotWrite
from beit.cli import COMMANDS, app, exit_code, start_from
from beit.commands.pretrain import Pretrain
from beit.image import BadImage
from beit.recipes import FOLDER
from beit.run import Stopped
from beit.settings import RunError, describe_settings, to_toml
from beit.weight_files import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(beit.cli.__file__).parent


# --- Help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_shows_an_example_of_it(cli: Cli, name: str) -> None:
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    assert "Example:" in out
    assert f"Example: beit {name}" in " ".join(out.split())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(cli: Cli, words: list[str]) -> None:
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    for name, says in COMMANDS.items():
        line = says if isinstance(says, str) else says[0]
        assert name in out
        assert line.split()[0] in out


def test_examples_are_whole_lines_that_can_be_copied(cli: Cli) -> None:
    """At 80 columns; a terminal that wraps one in two would have it run in two."""
    lines = cli("--help")[1].split("Examples:\n")[1].splitlines()
    examples = lines[1 : lines.index("", 1)]
    assert len(examples) >= 5
    for line in examples:
        name = line.split()[1]
        assert line.startswith("  beit ")
        assert name in COMMANDS
        app.parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)


def test_every_file_of_commands_is_a_command() -> None:
    files = {p.stem.replace("_", "-") for p in (PACKAGE / "commands").glob("*.py")} - {"--init--"}
    assert files == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_offers_a_negative_that_means_nothing(cli: Cli, name: str) -> None:
    out = cli(name, "--help")[1]
    assert "--empty-" not in out
    for flag in ("json", "overwrite", "fast", "gradient-checkpointing"):
        assert f"--no-{flag}" not in out


# The name says it all, the choices or the field's papers do.
SELF_EXPLANATORY = {
    "batch_size", "seed", "device", "precision", "min_lr", "weight_decay", "label_smoothing", "betas",
    "warmup_epochs",
}  # fmt: skip


def options_without_help(source: str) -> list[str]:
    """Fields of the settings that are not followed by a line of help."""
    found = []
    for settings in ast.parse(source).body:
        if not isinstance(settings, ast.ClassDef) or not settings.decorator_list:
            continue
        if "Parameter(name='*')" not in [ast.unparse(d) for d in settings.decorator_list]:
            continue
        for field, after in zip(settings.body, [*settings.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) != "_":
                has = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not has:
                    found.append(ast.unparse(field.target))
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_line_of_help_or_a_name_that_needs_none(name: str) -> None:
    source = (PACKAGE / "commands" / f"{name.replace('-', '_')}.py").read_text()
    missing = set(options_without_help(source)) - SELF_EXPLANATORY
    assert not missing, f"no help for {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", COMMANDS)
def test_where_a_command_has_out_it_has_o(name: str, cli: Cli) -> None:
    text = cli(name, "--help")[1]
    assert ("--out" in text.split()) == ("-o" in text.split("Example")[0].split())


def test_an_option_without_help_is_seen() -> None:
    code = (
        '@Parameter(name="*")\nclass A:\n    a: int\n    """Said."""\n    b: int = 1\n    c: int = 2\n'
    )
    assert options_without_help(code) == ["b", "c"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_dataclass_and_one_function(name: str) -> None:
    place = name.replace("-", "_")
    module = importlib.import_module(f"beit.commands.{place}")
    function = getattr(module, place)
    assert list(inspect.signature(function).parameters) == ["settings"]
    settings = getattr(module, "".join(part.title() for part in place.split("_")))
    assert settings.__dataclass_params__.frozen


def test_version_is_the_packages(cli: Cli) -> None:
    assert cli("--version") == (0, f"{beit.__version__}\n", "")


def test_a_process_answers_as_well(beit_process: object) -> None:
    done = beit_process("--version")  # type: ignore[operator]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{beit.__version__}\n", "")


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("clasify", "cat.jpg"), "did you mean classify"),
        (("train_tokeniser",), "train-tokenizer"),
        (("classify",), "--images"),
        (("classify", "cat.jpg"), "--model"),
        (("classify", "cat.jpg", "-m", "m", "--tops", "3"), "--tops"),
        (("classify", "cat.jpg", "-m", "m", "--top", "many"), "many"),
        (("evaluate", "a", "b", "-m", "m"), "'b'"),
        (("probe", "a", "-m"), "requires an argument"),
        (("probe", "a", "-m", "m", "--layers", "9", "12"), "give them with commas: --layers 9,12"),
        (("probe", "a", "--kinds", "linear,", "knn", "-m", "m"), "commas: --kinds linear,knn"),
        (("finetune", "nowhere", "-m", "m", "-o", "o"), "nowhere does not exist"),
        (("pretrain", "nowhere", "--tokenizer", "t", "-o", "o"), "nowhere does not exist"),
        (("train-tokenizer", "nowhere", "-o", "o"), "nowhere does not exist"),
        (("probe", "nowhere", "-m", "m"), "nowhere does not exist"),
        (("classify", "nowhere.jpg", "-m", "m"), "nowhere.jpg does not exist"),
    ],
)
def test_a_wrong_word_ends_with_2_and_is_named_on_stderr(
    cli: Cli, words: tuple[str, ...], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert cause in err
    assert "Traceback" not in err
    if not err.startswith("beit: "):  # in the words of the library that reads the words
        assert err.endswith(f"`beit {words[0]} --help` tells more, with an example")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_used_ends_with_5(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", tmp_path, model=tmp_path / "nothing")
    assert (code, out) == (5, "")
    cure = "check the path (`beit models` lists the released ones)"
    assert err == f"beit: {tmp_path / 'nothing'} does not exist; {cure}"


def test_a_place_that_cannot_be_written_ends_with_6(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out_folder = tmp_path / "file" / "run"
    code, out, err = cli("train-tokenizer", shapes, img_size=32, hidden_dim=4, out=out_folder)
    assert (code, out) == (6, "")
    assert f"cannot write the run folder {out_folder}" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (BadImage("unreadable", "a.png", "x"), 2),
        (RunError("x"), 2),
        (CheckpointError("x"), 5),
        (CannotWrite("x"), 6),
        (OSError(errno.ENOSPC, "full"), 6),
        (PermissionError(errno.EACCES, "forbidden"), 6),
        (FileNotFoundError(errno.ENOENT, "ours"), 1),
        (Stopped(130, "x"), 130),
        (Stopped(143, "x"), 143),
        (RuntimeError("ours"), 1),
        (KeyError("ours"), 1),
    ],
)
def test_an_error_has_the_documented_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code
    words = (beit.cli.__doc__ or "").replace("\n", " ")
    assert f"{code} " in words


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def app(words: list[str], **_: object) -> None:
        raise error

    monkeypatch.setattr(beit.cli, "app", app)


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
@pytest.mark.parametrize("name", ["train-tokenizer", "pretrain", "finetune"])
def test_a_training_that_is_stopped_outside_its_loop_ends_with_the_code_of_a_stop(
    name: str, number: str, code: int, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While it reads its pictures, say; a job that Slurm warned is put in its queue again by the code."""
    place = importlib.import_module(f"beit.commands.{name.replace('-', '_')}")

    def signalled(*_: object, **__: object) -> None:
        signal.raise_signal(getattr(signal, number))

    monkeypatch.setattr(place, "open_source", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    words = ["--tokenizer", "pixels"] if name == "pretrain" else []
    assert cli(name, tmp_path, *words, "--out", tmp_path / "run")[0] == code
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), 6,
         "cannot write a.json: No space left on device; make room or choose another place"),
        (OSError(errno.ENOSPC, "No space left on device"), 6,
         "cannot write: No space left on device; make room or choose another place"),
        (PermissionError(errno.EACCES, "Permission denied", "nowhere.json"), 6,
         "cannot write nowhere.json: Permission denied; make room or choose another place"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "photos"), 2,
         "cannot read photos: Is a directory; check its rights, or the path"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_names_the_file_and_a_cure(
    error: OSError, code: int, words: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    assert cli() == (code, "", f"beit: {words}")


@pytest.mark.parametrize("name", ["check", "finetune"])
def test_what_may_not_be_read_is_not_said_to_be_unwritable(
    name: str, cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To root nothing is forbidden, so the system is played."""

    def scandir(place: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", place)

    monkeypatch.setattr(beit.listing.os, "scandir", scandir)
    monkeypatch.setattr(beit.cli.os, "access", lambda place, _: place == str(tmp_path))
    more = [] if name == "check" else ["-m", "beit_mini_patch8_32", "-o", tmp_path / "run"]
    code, _, err = cli(name, shapes / "val", *more)
    told = f"cannot read {shapes / 'val'}/: Permission denied; check its rights, or the path"
    assert (code, err) == (2, f"beit: {told}")


def test_our_own_mistakes_keep_their_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli()


def test_debugging_shows_where_any_error_came_from(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ValueError("the user's"))
    assert cli() == (2, "", "beit: the user's")
    monkeypatch.setenv("BEIT_DEBUG", "1")
    with pytest.raises(ValueError, match="the user's"):
        cli()


@pytest.mark.parametrize(
    ("words", "anew"),
    [
        (["pretrain"], True), (["finetune", "x"], True), (["bench", "pretrain"], True),
        (["--offline", "pretrain"], True), (["--recipe", "digits", "finetune"], True),
        (["pretrain", "--help"], False), (["classify"], False), (["bench", "x"], False), ([], False),
    ],
)  # fmt: skip
def test_a_training_begins_anew_with_memory_that_is_kept(words: list[str], anew: bool) -> None:
    """Once, and in the same process, so that who started it can signal it."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    code = "import os, sys; print(os.getpid(), os.environ.get('GLIBC_TUNABLES')); sys.stdout.flush(); "
    code += "import beit.cli; beit.cli.run = lambda: None; beit.cli.main()"
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=True
    )
    first, *others = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert first[1] == "None"
    assert others == ([[first[0], beit.cli.KEPT_MEMORY]] if anew else [])
    given = {**environment, "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(" ", 1)[1] == "glibc.malloc.arena_max=2\n"


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_that_wait_sleep_soon_unless_one_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], becomes: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(beit.cli, "run", lambda: None)
    beit.cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == becomes


def test_ctrl_c_before_a_run_ends_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert cli()[0] == 130


GO_ON = "kept, give the same command to go on"
AGAIN = "kept, give the same command to begin again"


@pytest.mark.parametrize(
    ("words", "within", "told"),
    [
        (("embed", "-m", "m", "-o", "o"), "find_pictures", f"whole shards are {GO_ON}"),
        (("shard", "s"), "open_source", f"whole shards are {GO_ON}"),
        (("finetune",), "open_source", f"what was saved is {GO_ON}"),
        (
            ("finetune", "--overwrite"), "open_source",
            "what was saved is kept, give the same command without --overwrite to go on",
        ),
        (("check",), "open_source", f"nothing is {AGAIN}"),
        (("probe", "-m", "m"), "open_source", f"nothing is {AGAIN}"),
        (("export", "--to", "torch"), "load_model", f"nothing is {AGAIN}"),
        (("bench",), "cases_of", f"nothing is {AGAIN}"),
        (("info",), "resolve", ""),
        (("serve", "-m"), "_listen", ""),
    ],
)  # fmt: skip
def test_ctrl_c_says_in_a_line_what_is_kept(
    words: tuple[str, ...],
    within: str,
    told: str,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module(f"beit.commands.{words[0]}"), within, stopped)
    given = [*words, tmp_path] if words[-1] == "-m" else [words[0], tmp_path, *words[1:]]
    assert cli(*given) == (130, "", f"stopped; {told}" if told else "stopped")


def test_the_module_runs_as_the_program_does() -> None:
    tree = ast.parse((PACKAGE / "__main__.py").read_text())
    assert "from beit.cli import main" in ast.unparse(tree)
    assert "beit.cli" in sys.modules


# --- Recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/*.toml")), ids=lambda file: file.stem)
def test_a_recipe_sets_fields_of_its_command_and_says_what_came_out(file: Path) -> None:
    place = file.parent.name
    command = place.replace("_", "-")
    config = start_from([command], "--recipe", file.stem)
    content = tomllib.loads(file.read_text())
    assert content["expected"]
    assert content["source"]
    given = "photos --tokenizer t" if command == "pretrain" else "photos"
    app.config = [config]
    try:
        _, bound, _ = app.parse_args(f"{command} {given} -o run --lr 0.5")
    finally:
        app.config = []
    settings = bound.args[0]
    assert settings.lr == 0.5, "a flag goes before the recipe"
    for key, value in content["settings"].items():
        if key != "lr":
            got = getattr(settings, key)
            assert (list(got) if isinstance(got, tuple) else got) == value, key


def test_the_page_of_recipes_says_what_their_files_say() -> None:
    page = (PACKAGE.parent / "docs" / "recipes.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for file in FOLDER.glob("*/*.toml"):
        recipe = tomllib.loads(file.read_text())
        assert f"| `{file.stem}` | {recipe['expected']} | {recipe['cost']} |" in rows
    assert len(rows) == len(list(FOLDER.glob("*/*.toml")))


def test_flags_of_epochs_override_the_steps_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[settings]\nsteps = 500\nwarmup_steps = 100\n")
    for words, left in (
        (["--epochs", "1"], {"warmup-steps": 100}),
        (["--warmup-epochs=2"], {"steps": 500}),
        (["--lr", "1"], {"steps": 500, "warmup-steps": 100}),
    ):
        assert start_from(["pretrain", *words], "--recipe", str(file)).config == left


@pytest.mark.parametrize("layers", [(), (2, 4)])
def test_a_runs_own_settings_start_another_but_for_overwrite(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    """run.toml holds an empty list where no layer was named; and who goes on by it wants no run gone."""
    own = {"out": tmp_path / "a", "probe_layers": layers, "overwrite": True}
    first = Pretrain(Path("photos"), tokenizer=Path("pixels"), **own)
    (tmp_path / "run.toml").write_text(to_toml(describe_settings(first)))
    monkeypatch.setattr(app, "config", app.config)  # the tests that follow have none
    seen: list[Pretrain] = []
    monkeypatch.setattr(beit.commands.pretrain, "train", lambda settings, _: seen.append(settings))
    assert cli("pretrain", "-o", tmp_path / "b", config=tmp_path / "run.toml")[0] == 0
    assert seen == [replace(first, out=tmp_path / "b", overwrite=False)]


def test_the_run_of_another_command_starts_none(tmp_path: Path) -> None:
    own = Pretrain(Path("photos"), tokenizer=Path("pixels"), out=tmp_path / "a")
    (tmp_path / "run.toml").write_text(to_toml(describe_settings(own)))
    with pytest.raises(
        ValueError, match=r"run.toml is of beit pretrain, and this is beit train-tokenizer"
    ):
        start_from(["train-tokenizer"], "--config", str(tmp_path / "run.toml"))


def test_a_key_outside_settings_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('source = "me"\nepochs = 1\n[settings]\nlr = 1e-3\n')
    with pytest.raises(ValueError, match=r"'epochs' outside \[settings\]"):
        start_from(["pretrain"], "--recipe", str(file))


def test_misspelt_recipes_and_keys_name_the_nearest(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("pretrain", "x", tokenizer="t", out="o", recipe="beit_bas_22k")
    assert code == 2
    assert "did you mean beit_base_22k" in err
    code, _, err = cli("train-tokenizer", "x", out="o", recipe="beit_base_22k")
    assert code == 2
    assert "`beit train-tokenizer` has no recipe 'beit_base_22k'; did you mean beitv2_vqkd_base" in err
    (tmp_path / "mine.toml").write_text("[settings]\nepoch = 3\n")
    code, _, err = cli("pretrain", "x", tokenizer="t", out="o", recipe=tmp_path / "mine.toml")
    assert code == 2
    assert "sets 'epoch', which is no setting; did you mean epochs" in err


@pytest.mark.parametrize("words", [[], ["--help"], ["finetun"]])
@pytest.mark.parametrize("option", ["--recipe", "--config"])
def test_a_start_without_a_command_is_told(cli: Cli, option: str, words: list[str]) -> None:
    code, out, err = cli(option, "digits", *words)
    assert (code, out) == (2, "")
    assert ("did you mean finetune" if words == ["finetun"] else f"{option} is for a command") in err


def test_two_starts_and_a_start_without_a_name_are_refused(cli: Cli) -> None:
    assert cli("pretrain", "x", recipe="digits", config="run.toml")[0] == 2
    code, _, err = cli("pretrain", "x", "--recipe")
    assert code == 2
    assert "--recipe needs a value" in err
