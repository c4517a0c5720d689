"""Kill `beit embed` at random, two processes at a time: it must end as an unbroken run does, byte for byte.

    python tests/chaos_embed.py --pictures 5000 --kills 200      (`make chaos-embed`)

Processes are forked from one that has done the job itself, so that most of their time is at risk. After
each kill every file that has its name must be that of the unbroken run; a process that was killed is
started again with the same words. Half of the pairs split the shards, the others race for the same ones.
Prints what was counted as JSON; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import command_line, draw_shape

from beit.checkpoints import save
from beit.cli import main
from beit.embeddings import BAD_IMAGES, MANIFEST, WRITING, Embeddings
from beit.model import BeitConfig, BeitForImageClassification

MODEL = BeitConfig(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)
OPTIONS = {"shard_size": 25, "precision": "fp32"}
EVERY_BAD = 500  # one picture of so many cannot be read
DONE = 3  # exit code: done, and some pictures could not be read
PAIRS = (("1/2", "2/2"), ("1/2", "2/2"), ("1/1", "1/1"), ("1/1", "2/2"))


class Chaos:
    def __init__(self, folder: Path, pictures: int, seed: int) -> None:
        self.folder, self.pictures, self.rng = folder, pictures, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        (folder / "data").mkdir()
        for number in range(pictures):
            file = folder / "data" / f"{number:05d}.png"
            if number % EVERY_BAD == EVERY_BAD // 2:
                file.write_bytes(b"no picture")
            else:
                shape = ("disc", "square", "triangle")[number % 3]
                draw_shape(shape, 36, np.random.default_rng(number)).save(file)
        torch.manual_seed(seed)
        save(BeitForImageClassification(MODEL), folder / "model")
        self.out = folder / "killed"
        here(self.words(folder / "unbroken", "1/1"), DONE)
        self.expected = contents(folder / "unbroken")
        began = time.monotonic()
        code = wait(self.start("1/1"))
        self.seconds = time.monotonic() - began
        self.compare(code)

    def words(self, out: Path, part: str) -> list[str]:
        options = {**OPTIONS, "model": self.folder / "model", "out": out, "part": part}
        return ["embed", *command_line(self.folder / "data", **options)]

    def start(self, part: str) -> int:
        """Fork a process that embeds; its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            with (self.folder / "said").open("a") as said:
                os.dup2(said.fileno(), 2)
                sys.argv = ["beit", *self.words(self.out, part)]
                main()
                code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def job(self, kills: int) -> None:
        """A whole job, with kills until it is done or there have been enough."""
        parts = self.rng.choice(PAIRS)
        crew = {self.start(part): part for part in parts}
        while crew and self.counts["kills"] < kills and not self.failures:
            self.wait_a_while(crew)
            victim = self.rng.choice(list(crew))
            ended, status = os.waitpid(victim, os.WNOHANG)
            if ended:
                self.ended(os.waitstatus_to_exitcode(status))
                del crew[victim]
                continue
            phase = self.phase_of(victim)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            self.counts["kills"] += 1
            self.counts[f"kills: {phase}"] += 1
            self.look()
            part = crew.pop(victim)
            crew[self.start(part)] = part
        for child in crew:
            self.ended(wait(child))
        self.counts[f"jobs: parts {' and '.join(parts)}"] += 1
        self.compare(wait(self.start("1/1")))

    def wait_a_while(self, crew: dict[int, str]) -> None:
        """A random time; every third time until somebody is writing."""
        writing = self.rng.random() < 1 / 3
        until = time.monotonic() + (2.0 if writing else self.seconds * 0.3 * self.rng.random())
        while time.monotonic() < until:
            if writing and any(self.phase_of(child) == "writing" for child in crew):
                return
            time.sleep(0.0005)

    def phase_of(self, child: int) -> str:
        """What a process is doing, by what it has written."""
        scratch = next(self.out.glob(f"{WRITING}{child}-*"), None)
        if scratch is None:
            return "before its first shard"
        with contextlib.suppress(OSError):
            return "writing" if any(scratch.iterdir()) else "embedding"
        return "embedding"

    def ended(self, code: int) -> None:
        self.counts["processes that ended by themselves"] += 1
        if code not in (0, DONE):
            self.fail(f"a process ended with {code}: {(self.folder / 'said').read_text()[-500:]}")

    def look(self) -> None:
        """Every file that has its name is whole, while others write."""
        for name, content in contents(self.out).items():
            if name != BAD_IMAGES and self.expected.get(name) != content:
                self.fail(f"{name} is not that of the unbroken run")
        self.counts["looks"] += 1

    def compare(self, code: int) -> None:
        """The finished folder is the unbroken one; then it goes."""
        if code != DONE:
            self.fail(f"the last run ended with {code}")
        found = contents(self.out)
        if found != self.expected:
            different = sorted(n for n in found | self.expected if found.get(n) != self.expected.get(n))
            self.fail(f"{', '.join(different[:5])}: not as in the unbroken run")
        hidden = [path.name for path in self.out.glob(".*")]
        if hidden:
            self.fail(f"{', '.join(hidden)} left behind")
        made = Embeddings(self.out)
        seen = [index for shard in range(made.manifest.shards) for index, _ in made.ids(shard)]
        rows = sum(len(made.vectors(shard)) for shard in range(made.manifest.shards))
        bad = [
            int(row[0])
            for row in csv.reader(io.StringIO(found[BAD_IMAGES].decode()))
            if row[0].isdecimal()
        ]
        if rows != len(seen) or sorted([*seen, *bad]) != list(range(self.pictures)):
            self.fail("rows are lost or doubled")
        self.counts["rows compared"] += rows
        self.counts["jobs compared"] += 1
        shutil.rmtree(self.out)


def here(words: list[str], expected: int) -> None:
    """Run a command in this process."""
    sys.argv = ["beit", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == expected, f"{words} ended with {code}"


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """What has its name in a folder that others may be writing to."""
    if not (folder / MANIFEST).exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def chaos(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # more would be threads that a fork loses
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        run = Chaos(Path(place), arguments.pictures, arguments.seed)
        while run.counts["kills"] < arguments.kills and not run.failures:
            run.job(arguments.kills)
            print(f"\r{dict(run.counts)} {run.failures}", end="", file=sys.stderr, flush=True)
        result = {
            "seed": arguments.seed, "pictures": arguments.pictures, **run.counts,
            "unbroken, s": round(run.seconds, 1), "seconds": round(time.monotonic() - began),
            "failures": run.failures,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 1 if run.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (("pictures", 5000), ("kills", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    sys.exit(chaos(parser.parse_args()))
