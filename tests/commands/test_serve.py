"""`beit serve`: the numbers of the engine over HTTP, and what is refused."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, Cli

import beit.commands.serve
from beit.commands.serve import Serve
from beit.engine import Engine

from .conftest import Done, Served, serving


@pytest.fixture(scope="module")
def server(finetuned: Done) -> Iterator[Served]:
    with serving("--model", finetuned.folder, "--precision", "fp32") as served:
        yield served


@pytest.fixture(scope="module")
def engine(finetuned: Done) -> Engine:
    return Engine(finetuned.folder, precision="fp32")


@pytest.fixture(scope="module")
def files(shapes: Path) -> list[Path]:
    return sorted((shapes / "val").rglob("*.png"))


def test_an_answer_is_the_engines_to_the_last_bit(
    server: Served, engine: Engine, files: list[Path]
) -> None:
    for file in files:
        status, _, answer = server.ask("POST", "/v1/classify?top=2", file.read_bytes())
        expected = next(engine.classify(file, top=2))
        assert status == 200
        assert answer.pop("ms") > 0
        assert answer == {
            "label": expected.label, "score": expected.score, "top": [list(pair) for pair in expected.top]
        }  # fmt: skip


@pytest.mark.parametrize("query", ["", "?pooling=cls", "?pooling=tokens&layer=2", "?layer=-1"])
def test_features_are_the_engines(server: Served, engine: Engine, files: list[Path], query: str) -> None:
    options: dict[str, Any] = dict(pair.split("=") for pair in query[1:].split("&") if pair)
    options |= {"layer": int(options["layer"])} if "layer" in options else {}
    status, _, answer = server.ask("POST", f"/v1/embed{query}", files[0].read_bytes())
    expected = next(engine.embed(files[0], **options)).vector
    assert status == 200
    assert np.array_equal(np.array(answer["vector"], np.float32), expected)


def test_many_callers_at_once_get_the_answers_of_their_own_pictures(
    server: Served, engine: Engine, files: list[Path]
) -> None:
    expected = {file: next(engine.classify(file)).score for file in files}
    wrong = []

    def call(file: Path) -> None:
        status, _, answer = server.ask("POST", "/v1/classify", file.read_bytes())
        if status != 200 or answer["score"] != expected[file]:
            wrong.append((file, answer))

    callers = [threading.Thread(target=call, args=(file,)) for file in files * 2]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(set(expected.values())) > 5
    assert not wrong


def test_the_model_is_described(server: Served, engine: Engine, finetuned: Done) -> None:
    status, _, answer = server.ask("GET", "/v1/model")
    assert status == 200
    assert answer["model"] == str(finetuned.folder)
    assert answer["labels"] == engine.labels
    assert answer["preprocessing"]["size"] == list(engine.image_spec.size)
    assert server.ask("GET", "/health")[0] == 200
    paths = server.ask("GET", "/openapi.json")[2]["paths"]
    assert paths.keys() == {"/v1/classify", "/v1/embed", "/v1/model", "/health"}


REFUSED: dict[str, tuple[str, str, bytes | None, dict[str, str], int, str]] = {
    "no picture": ("POST", "/v1/classify", b"", {}, 400, "send a picture's file"),
    "text": ("POST", "/v1/classify", b"hello", {}, 422, "not a readable picture"),
    "half a picture": ("POST", "/v1/embed", b"HALF", {}, 422, "not a readable picture"),
    "no classes": ("POST", "/v1/classify?top=0", b"FILE", {}, 400, "top: "),
    "no such pooling": ("POST", "/v1/embed?pooling=max", b"FILE", {}, 400, "pooling: "),
    "no such layer": ("POST", "/v1/embed?layer=99", b"FILE", {}, 400, "layer 99 does not exist"),
    "no such key": ("POST", "/v1/classify?topk=3", b"FILE", {}, 400,
                    "'topk' is no key of /v1/classify; it knows top"),
    "a key of another": ("POST", "/v1/embed?top=3", b"FILE", {}, 400, "it knows pooling, layer"),
    "a form": ("POST", "/v1/classify", b"--a", {"Content-Type": "multipart/form-data; boundary=a"}, 400,
               "a form is not read; send a picture's file as the body: curl --data-binary"),
    "no such path": ("GET", "/classify", None, {}, 404, "POST /v1/classify"),
    "wrong method": ("GET", "/v1/classify", None, {}, 405, "POST /v1/classify"),
    "another name": ("GET", "/v1/model", None, {"Host": "evil.example"}, 421, "evil.example"),
    "half a name": ("GET", "/v1/model", None, {"Host": "[::1"}, 421, "[::1"),
    "another site": ("POST", "/v1/classify", b"FILE", {"Origin": "http://evil.example"}, 403, "may not"),
    "declared too large": ("POST", "/v1/classify", None, {"Content-Length": "20000001"}, 413, "20,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(server: Served, files: list[Path], case: str) -> None:
    method, path, body, headers, status, words = REFUSED[case]
    picture = files[0].read_bytes()
    body = {b"FILE": picture, b"HALF": picture[:60]}.get(body or b"", body)
    came, _, answer = server.ask(method, path, body, headers)
    assert came == status, answer
    assert words in answer["error"]["message"]
    assert answer["error"]["code"] not in ("", "failed")


def test_more_than_the_limit_is_refused_while_it_comes(server: Served) -> None:
    """Without a declared length: the server reads as far as the limit and no further."""
    with socket.create_connection((server.host, server.port), timeout=60) as line:
        line.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        part = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
        try:
            for _ in range(21):
                line.sendall(part)
        except OSError:  # it closed while we sent
            pass
        assert b" 413 " in line.recv(100)
    assert server.ask("GET", "/health")[2] == {"waiting": 0}


def test_who_sends_it_all_before_reading_is_told_why_it_is_refused(server: Served) -> None:
    """As urllib does: a connection that is closed before is reset, and the answer is lost."""
    url = f"http://{server.host}:{server.port}/v1/classify"
    for size, headers, code in ((21_000_000, {}, 413), (8_000_000, {"Origin": "http://evil"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(urllib.request.Request(url, bytes(size), headers), timeout=60)
        assert told.value.code == code
        told.value.close()


def test_a_caller_that_goes_away_takes_no_place(server: Served) -> None:
    for _ in range(3):
        with socket.create_connection((server.host, server.port)) as line:
            line.sendall(
                b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc"
            )
    for _ in range(100):
        if server.ask("GET", "/health")[2] == {"waiting": 0}:
            return
        time.sleep(0.1)
    pytest.fail("a place is still taken")


def test_a_picture_that_comes_too_slowly_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body never ends: 408, and the place is free again."""
    monkeypatch.setattr(beit.commands.serve, "BODY_SECONDS", 0.05)
    app = beit.commands.serve.make_app(engine, Serve(model="m"))
    sent: list[Any] = []

    async def ask(method: str, path: str) -> None:
        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": method, "path": path, "query_string": b"", "root_path": "",
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(ask("POST", "/v1/classify"))
    assert sent[0]["status"] == 408
    assert b"did not come within" in sent[1]["body"]
    asyncio.run(ask("GET", "/health"))
    assert json.loads(sent[3]["body"]) == {"waiting": 0}


def test_whoever_comes_when_all_places_are_taken_is_told_at_once(
    finetuned: Done, files: list[Path]
) -> None:
    with (
        serving("--model", finetuned.folder, "--max-waiting", "1") as server,
        socket.create_connection((server.host, server.port)) as line,
    ):
        line.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        while server.ask("GET", "/health")[2] != {"waiting": 1}:
            time.sleep(0.05)
        status, headers, answer = server.ask("POST", "/v1/classify", files[0].read_bytes())
        assert (status, headers["retry-after"]) == (429, "1")
        assert "come again" in answer["error"]["message"]


def test_a_key_is_asked_for_where_one_is_set(finetuned: Done, files: list[Path]) -> None:
    words = ("--model", finetuned.folder, "--host", "0.0.0.0")
    with serving(*words, BEIT_API_KEY="schlüssel") as server:
        key = "Bearer schlüssel".encode().decode("latin-1")  # as it goes over the wire
        assert (
            server.ask("POST", "/v1/classify", files[0].read_bytes(), {"Authorization": key})[0] == 200
        )
    with serving(*words, BEIT_API_KEY="a long random text") as server:
        picture = files[0].read_bytes()
        for wrong in ({}, {"Authorization": "Bearer a"}, {"Authorization": "a long random text"}):
            status, headers, answer = server.ask("POST", "/v1/classify", picture, wrong)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert "Bearer" in answer["error"]["message"]
        right = {"Authorization": "Bearer a long random text"}
        assert server.ask("POST", "/v1/classify", picture, right)[0] == 200


def test_a_missing_extra_is_named() -> None:
    hidden = "import sys; sys.modules['fastapi'] = None; from beit.cli import main; main()"
    command = [sys.executable, "-c", hidden, "serve", "-m", "flowers.run"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "beit[serve]"' in done.stderr


def test_other_machines_are_not_answered_without_a_key(cli: Cli, finetuned: Done) -> None:
    code, _, err = cli("serve", model=finetuned.folder, host="0.0.0.0")
    assert code == 2
    assert "BEIT_API_KEY" in err


def test_a_port_that_cannot_be_had_is_named_with_the_cure(cli: Cli, finetuned: Done) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = cli("serve", model=finetuned.folder, port=port)
    assert code == 2
    assert f"port {port}" in err
    assert "--port 0" in err
    assert cli("serve", model=finetuned.folder, port=70000)[0] == 2


def test_an_encoder_embeds_and_says_that_it_has_no_classifier(
    pretrained: Done, files: list[Path]
) -> None:
    with serving("--model", pretrained.folder) as server:
        assert server.ask("POST", "/v1/embed", files[0].read_bytes())[0] == 200
        assert server.ask("GET", "/v1/model")[2]["labels"] is None
        status, _, answer = server.ask("POST", "/v1/classify", files[0].read_bytes())
        assert status == 400
        assert "has no classifier" in answer["error"]["message"]


def test_a_file_of_some_features_gives_these(
    cli: Cli, finetuned: Done, files: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    file = tmp_path / "second.xml"
    options = {"to": "openvino", "kind": "features", "layer": 2, "pooling": "cls", "out": file}
    assert cli("export", finetuned.folder, **options)[0] == 0
    with serving("--model", file, "--precision", "fp32") as server:
        status, _, answer = server.ask("POST", "/v1/embed?pooling=cls&layer=2", files[0].read_bytes())
        assert status == 200
        expected = next(Engine(file, precision="fp32").embed(files[0], "cls", 2)).vector
        assert np.array_equal(np.array(answer["vector"], np.float32), expected)
        status, _, answer = server.ask("POST", "/v1/embed", files[0].read_bytes())
        assert status == 400
        assert "holds features (cls, layer 2)" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)],  # -15 is a shell's 143
)
def test_told_to_stop_it_ends_what_it_has_begun(
    finetuned: Done, files: list[Path], number: signal.Signals, code: int
) -> None:
    """Half a request is there when the signal comes; its answer still goes out."""
    picture = files[0].read_bytes()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(picture)}\r\n\r\n"
    with serving("--model", finetuned.folder) as server:
        with socket.create_connection((server.host, server.port)) as line:
            line.sendall(head.encode() + picture[:50])
            while server.ask("GET", "/health")[2] != {"waiting": 1}:
                time.sleep(0.05)
            server.process.send_signal(number)
            time.sleep(0.3)
            line.sendall(picture[50:])
            assert b" 200 " in line.recv(100)
        assert server.process.wait(60) == code
