"""`beit <command>`: the names, a line of help for each, and what becomes of errors.

Commands are imported when they are called, so that `beit --help` never waits for torch.

Exit codes: 0 done; 1 failed; 2 usage or settings; 3 done, some inputs skipped; 5 model refused;
6 cannot write; 130 Ctrl-C and 143 SIGTERM, both after saving.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version

from cyclopts import App, Parameter

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
        "beit finetune flowers/ -m pretrained -o flowers.run",
    ),
    "probe": (
        "Linear-probe a model: logistic regression on frozen features.",
        "beit probe flowers/ -m pretrained",
    ),
    "evaluate": (
        "Score a classifier on labelled pictures.",
        "beit evaluate flowers/ -m flowers.run",
    ),
    "classify": (
        "Classify pictures.",
        "beit classify photos/ -m flowers.run --top 3 -o out.csv",
    ),
    "models": (
        "List the released models, and what to type for each.",
        "beit models beitv2",
    ),
    "convert": (
        "Convert a model between the formats of transformers, timm and unilm.",
        "beit convert beit_base_patch16_224_pt22k_ft22kto1k.pth base-224",
    ),
    "info": (
        "Tell what a model file or folder is.",
        "beit info base-224",
    ),
}

EPILOGUE = "\n".join(
    [
        "Examples:",
        "",
        *(f"  {example}" for _, example in COMMANDS.values()),
        "",
        "`beit <command> --help` tells the settings of one.",
        "With --offline, or BEIT_OFFLINE=1, no command downloads a model.",
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
    default_parameter=Parameter(negative=()),  # a flag is given or not
)
for _name, (_help, _example) in COMMANDS.items():
    _place = _name.replace("-", "_")
    app.command(
        f"beit.commands.{_place}:{_place}",
        name=_name,
        help=_help,
        help_epilogue=f"Example: {_example}\n",
    )


def main() -> None:
    """Run one command and exit with its code. BEIT_DEBUG=1 shows where an error came from."""
    if "--offline" in sys.argv[1:]:  # of every command, so a setting of none
        sys.argv.remove("--offline")
        os.environ["BEIT_OFFLINE"] = "1"
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("BEIT_DEBUG"):
            raise
        code = exit_code(error)
        if code == 1:
            raise
        print(f"beit: {error}", file=sys.stderr)
        sys.exit(code)


def exit_code(error: Exception) -> int:
    """What an error means to a script; 1 is ours, and keeps its traceback."""
    if hasattr(error, "exit_code"):
        return int(error.exit_code)
    if isinstance(error, OSError):
        full_or_forbidden = ("ENOSPC", "EACCES", "EROFS", "EDQUOT", "ENOTDIR", "EISDIR")
        return 6 if errno.errorcode.get(error.errno or 0) in full_or_forbidden else 1
    return 2 if isinstance(error, ValueError) else 1
