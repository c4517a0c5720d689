"""`beit <command>`: the names, a line of help for each, and what becomes of errors.

Commands are imported when they are called, so that `beit --help` never waits for torch.

Exit codes: 0 done; 1 failed; 2 usage or settings; 3 done, some inputs skipped;
4 too many bad pictures; 5 model refused; 6 cannot write; 130 Ctrl-C and 143 SIGTERM, both after saving.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from importlib.metadata import version
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.config import Dict as Config

from beit.atomic import CURE, NO_ROOM_OR_RIGHTS
from beit.names import printable
from beit.recipes import find_recipe, nearest, read_settings
from beit.stop import stop_at_once

# They end with 130 or 143 wherever a stop signal meets them, also while libraries are still loaded.
TRAININGS = ("demo", "train-tokenizer", "pretrain", "finetune")

# glibc's settings for them: blocks up to 32 MiB, the most that it allows, are not given back.
KEPT_MEMORY = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_threshold=33554432", "trim_threshold=20000000000")
)

# Name: (a line of help, an example).
COMMANDS = {
    "demo": (
        "The whole way on handwritten digits, in minutes: tokenizer to classifier.",
        "beit demo",
    ),
    "train-tokenizer": (
        "Learn visual tokens from your own pictures.",
        "beit train-tokenizer photos/ -o tokenizer --vocab-size 1024",
    ),
    "pretrain": (
        "Pre-train a BEiT on pictures without labels.",
        "beit pretrain photos/ --tokenizer tokenizer -o pretrained",
    ),
    "finetune": (
        "Fine-tune a model on labelled pictures.",
        "beit finetune flowers/",
    ),
    "probe": (
        "Probe a model's frozen features: linear, SGD, k-NN, attentive, few-shot.",
        "beit probe flowers/ -m pretrained",
    ),
    "evaluate": (
        "Score a classifier: accuracy with intervals, calibration, confusions.",
        "beit evaluate flowers/ -m flowers.run",
    ),
    "classify": (
        "Classify pictures.",
        "beit classify photos/ -m flowers.run --top 3 -o out.csv",
    ),
    "embed": (
        "Embed any number of pictures, in shards; goes on where it was stopped.",
        "beit embed photos/ -m base-224 -o vectors",
    ),
    "serve": (
        "Answer over HTTP on this machine: classes or features of the pictures that are sent.",
        "beit serve -m flowers.run",
    ),
    "search": (
        "Find the pictures of `beit embed` that are most like one.",
        "beit search vectors photo.jpg --sheet sheet.jpg",
    ),
    "doctor": (
        "Tell what is installed, how fast this machine is, and what would make it faster.",
        "beit doctor",
    ),
    "models": (
        "List the released models, and what to type for each.",
        "beit models beitv2",
    ),
    "convert": (
        "Convert a model between the formats of transformers, timm and unilm.",
        "beit convert beit_base_patch16_224_pt22k_ft22kto1k.pth base-224",
    ),
    "export": (
        "Write a model as a graph for OpenVINO, ONNX Runtime or torch.export; int8 too.",
        "beit export flowers.run --to openvino -o flowers.xml",
    ),
    "bench": (
        "Time a model in every runtime that is installed, beside transformers and timm.",
        "beit bench flowers.run --batch-sizes 1 4",
    ),
    "check": (
        "Read every picture of a dataset once, and tell what would trouble a run.",
        "beit check flowers/",
    ),
    "shard": (
        "Copy a dataset into tar shards of smaller JPEGs, which a run reads faster.",
        "beit shard flowers/ flowers-256/ --short-side 256 --quality 90",
    ),
    "bench-pretrain": (
        "Time pre-training here, part by part, beside transformers.",
        "beit bench-pretrain --batch-size 8",
    ),
    "info": (
        "Tell what a model file or folder is.",
        "beit info base-224",
    ),
}

# What Ctrl-C leaves of a command, unless its KeyboardInterrupt tells it; the others leave nothing.
STOPPED = {
    **dict.fromkeys(TRAININGS, "what was saved is kept, give the same command to go on"),
    **dict.fromkeys(("embed", "shard"), "whole shards are kept, give the same command to go on"),
    **dict.fromkeys(
        ("probe", "evaluate", "search", "check", "convert", "export", "bench", "bench-pretrain"),
        "nothing is kept, give the same command to begin again",
    ),
}

STARTS = "--recipe NAME or --config RUN/run.toml sets what no flag does.\n"
EPILOGUE = "\n".join(
    [
        "Examples:",
        "",
        *(f"  {example}" for _, example in COMMANDS.values()),
        "",
        "`beit <command> --help` tells the settings of one. --recipe NAME begins from a published one's,",
        "--config RUN/run.toml from an earlier run's; flags override either.",
        "With --offline, or BEIT_OFFLINE=1, no command downloads a model.",
        "Exit codes: 0 done, 1 a defect, 2 wrong use, 3 done but for some pictures, 4 too many unreadable,",
        "5 no such model or a bad one, 6 cannot write, 130 or 143 stopped (docs/runs.md).",
        "",
    ]
)

app = App(
    name="beit",
    help="BEiT vision transformers: tokenizers, pre-training, fine-tuning, classification.",
    help_epilogue=EPILOGUE,
    help_format="plaintext",
    version=lambda: version("beit"),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what is kept
    default_parameter=Parameter(negative=()),  # a flag is given or not
)
for _name, (_help, _example) in COMMANDS.items():
    _place = _name.replace("-", "_")
    app.command(
        f"beit.commands.{_place}:{_place}",
        name=_name,
        help=_help,
        help_epilogue=f"Example: {_example}\n" + (STARTS if _name in TRAININGS else ""),
    )


def keep_memory() -> None:
    """Begin a training anew, in the same process, with a C library that keeps memory, in huge pages.

    A step frees what the next one takes again; without the system's part in that a step of base takes a
    tenth less. glibc reads this once, as it starts; where it is set already it stays.
    """
    known = "GLIBC_TUNABLES" in os.environ
    words = list(dropwhile(lambda word: word not in COMMANDS, sys.argv[1:]))  # from the command on
    trains = words[:1] in [[name] for name in (*TRAININGS, "bench-pretrain")]
    trains = trains or words[:2] == ["bench", "pretrain"]
    if trains and not known and "--help" not in words and platform.libc_ver()[0] == "glibc":
        os.environ["GLIBC_TUNABLES"] = KEPT_MEMORY
        os.execv(sys.executable, sys.orig_argv)


def main() -> None:
    """Run one command and exit with its code. BEIT_DEBUG=1 shows where an error came from."""
    keep_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may hold what the terminal has no letter for.
        sys.stdout.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Turns that torch's threads wait for each other before they sleep. With the library's own 300,000
        # they keep a busy machine's processors from each other: two trainings took three times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        try:
            run()
        except SystemExit as end:
            # Ctrl-C may leave the lock of a pool's semaphore held; its threads wait for it for ever, and
            # Python for them.
            if isinstance(end.__context__, KeyboardInterrupt):
                leave(130)
            raise
        return
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    # One of torchrun's: its threads that talk to the others may abort an interpreter that ends.
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process without its threads."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run() -> None:
    """The command that sys.argv names; its errors become messages and exit codes."""
    words = sys.argv[1:]
    if "--offline" in words:  # of every command, so a setting of none
        words.remove("--offline")
        os.environ["BEIT_OFFLINE"] = "1"
    try:
        start = take_start(words)
        if words[:2] == ["bench", "pretrain"]:
            words[:2] = ["bench-pretrain"]
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]!r}; {nearest(words[0], COMMANDS)}")
        if start and (not words or words[0] not in COMMANDS):
            raise ValueError(f"{start[0]} is for a command: beit finetune flowers/ {start[0]} ...")
        app.config = [start_from(words, *start)] if start else []
        trains = bool(words) and words[0] in TRAININGS
        alone = stop_at_once(kept(words)) if trains else nullcontext()
        with alone, lasting_output() if trains else nullcontext():
            app(words, exit_on_error=False)
    except CycloptsError as error:  # it has said what is wrong
        command = f"beit {words[0]}" if words and words[0] in COMMANDS else "beit"
        with suppress(OSError):
            if isinstance(error, UnusedCliTokensError) and (hint := with_commas(words)):
                print(hint, file=sys.stderr)
            print(f"`{command} --help` tells more, with an example", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        with suppress(OSError):
            print("; ".join(filter(None, ("stopped", str(stop) or kept(words)))), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        drop_output()
        sys.exit(0)
    except Exception as error:
        if os.environ.get("BEIT_DEBUG"):
            raise
        code = exit_code(error)
        if code == 1 and not hasattr(error, "exit_code"):
            raise
        with suppress(OSError):  # nobody reads it; the code is told all the same
            lines = map(printable, words_of(error).split("\n"))
            print("beit:", "\n".join(lines), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it was what failed
            drop_output()
        sys.exit(code)


def kept(words: list[str]) -> str:
    """What Ctrl-C or a signal leaves of a command, and what to type next; a training would begin again
    with --overwrite."""
    told = STOPPED.get(words[0] if words else "", "")
    overwrites = "--overwrite" in words and words[0] in TRAININGS
    return told.replace("command", "command without --overwrite") if overwrites else told


def with_commas(words: list[str]) -> str:
    """How a setting that was given several words is typed, where it takes one with commas."""
    for place, option in enumerate(words):
        values = list(takewhile(lambda word: not word.startswith("-"), words[place + 1 :]))
        if option in ("--layers", "--kinds") and len(values) > 1:
            return f"give them with commas: {option} {','.join(word.strip(',') for word in values)}"
    return ""


class LastingStream:
    """What is told, while somebody reads it: a training does not end with its `tee`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, if that can be."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """stdout and stderr that may lose their readers without an error."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LastingStream, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()


def drop_output() -> None:
    """Send what is still to be printed nowhere, or Python tries again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_start(words: list[str]) -> tuple[str, str] | None:
    """Take `--recipe NAME` or `--config FILE` out of the words; None where neither is there."""
    found: list[tuple[str, str]] = []
    for option in ("--recipe", "--config"):
        while any(word == option or word.startswith(f"{option}=") for word in words):
            place = next(i for i, w in enumerate(words) if w.split("=")[0] == option)
            word = words.pop(place)
            if "=" not in word and (place == len(words) or words[place].startswith("-")):
                raise ValueError(f"{option} needs a value")
            found.append((option, word.split("=", 1)[1] if "=" in word else words.pop(place)))
    if len(found) > 1:
        raise ValueError("give one --recipe or one --config, and flags to change single settings")
    return found[0] if found else None


def start_from(words: list[str], option: str, name: str) -> Config:
    """The settings of a recipe or of an earlier run, as defaults that flags override."""
    command, given = words[0], {word.split("=")[0] for word in words}
    place = command.replace("-", "_")
    settings = getattr(import_module(f"beit.commands.{place}"), place.title().replace("_", ""))
    file = find_recipe(command, name) if option == "--recipe" else Path(name)
    values = read_settings(file, settings)
    for flag, other in (("--epochs", "steps"), ("--warmup-epochs", "warmup_steps")):
        if flag in given:  # two ways to say one thing, of which the recipe's would win
            values.pop(other, None)
    if (
        option == "--config"
    ):  # no flag says an empty list; that run may have overwritten, this one asks for itself
        values = {k: v for k, v in values.items() if v != [] and k != "overwrite"}
    options = {key.replace("_", "-"): value for key, value in values.items()}
    return Config(options, use_commands_as_keys=False, source=str(file))


def exit_code(error: Exception) -> int:
    """What an error means to a script; 1 is ours, and keeps its traceback unless it chose that number."""
    if hasattr(error, "exit_code"):
        return int(error.exit_code)
    if isinstance(error, OSError):
        if error.errno not in (*NO_ROOM_OR_RIGHTS, errno.ENOTDIR, errno.EISDIR):
            return 1
        return 2 if is_unreadable(error) else 6
    return 2 if isinstance(error, ValueError) else 1


def is_unreadable(error: OSError) -> bool:
    """Whether an error is of reading: whoever writes has refused folders, and places without rights."""
    place = error.filename
    if error.errno == errno.EISDIR:
        return True
    if error.errno != errno.EACCES or place is None:
        return False
    if os.path.lexists(place):
        return not os.access(place, os.R_OK)
    return not os.access(os.path.dirname(place) or ".", os.X_OK)


def words_of(error: Exception) -> str:
    """What is told of an error; the system's own words name neither what was done nor a cure."""
    code = exit_code(error)
    if not isinstance(error, OSError) or code not in (2, 6):
        return str(error)
    what, cure = ("read", "check its rights, or the path") if code == 2 else ("write", CURE)
    place = "" if error.filename is None else f" {error.filename}"
    return f"cannot {what}{place}: {error.strerror or error}; {cure}"
