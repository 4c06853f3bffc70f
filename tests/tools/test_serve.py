"""Tests that `earshot serve` gives the answers of the exported model to a real OpenAI client and a real browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import io
import json
import os
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
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openai
import pytest
import soundfile
import torch
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse
from starlette.testclient import TestClient
from tokenizers.decoders import ByteFallback

from tests.browser import browse_url, need_chromium
from tests.tools.exportable import write_run
from tools import export, serve
from trainer.evaluation.offline.model import find_model, load_model
from trainer.serving.app import _Queue, make_app
from trainer.serving.requests import RequestError
from trainer.serving.service import TRANSCRIBE, Service, _Text

ROOT = Path(__file__).parents[2]
TIMEOUT_SEC = 100
KEY = "only-for-this-test"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    write_run(root / "run")
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32"]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tools.serve", str(exported), "--port", "0", "--max-request-mib", "8"]
    environment = {**os.environ, "EARSHOT_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is ready: http://127.0.0.1:" in line, line
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_SEC) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, timeout=TIMEOUT_SEC, max_retries=0)


def wave(seconds: float = 0.5, seed: int = 0) -> np.ndarray:
    noise = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    return (np.round(noise * 32767) / 32767).astype(np.float32)


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


def block(samples: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(wav(samples)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def hours_of_silence() -> dict[str, Any]:
    """Return a clip of 62 minutes whose file has only about 100 kB."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16000 * 3700, np.int16), 16000, format="FLAC")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode()}}


def generated(exported: Path, samples: np.ndarray, text: str) -> str:
    loaded = load_model(find_model(exported), torch.float32, torch.device("cpu"))
    inputs = loaded.processor(audio=samples, text=text)
    found = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return loaded.processor.batch_decode(found)[0]


def test_a_client_gets_the_answer_of_generate(client: openai.OpenAI, exported: Path) -> None:
    (model,) = client.models.list().data
    message = {"role": "user", "content": [block(wave()), {"type": "text", "text": "what is it"}]}
    found = client.chat.completions.create(model=model.id, messages=[message])  # type: ignore[list-item]
    assert found.choices[0].message.content == generated(exported, wave(), "what is it")
    assert found.usage is not None and found.usage.prompt_tokens > 5
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    (gates,) = found.earshot["routing"]  # type: ignore[attr-defined]
    for weights in gates.values():
        assert weights and all(0 < weight <= 1 for weight in weights.values())
    stream = client.chat.completions.create(model=model.id, messages=[message], stream=True)  # type: ignore[list-item]
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == found.choices[0].message.content
    assert parts[-1].finish_reason == found.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="must be a list"):
        client.chat.completions.create(model=model.id, messages=[], stream=True)


def test_a_client_transcribes_files(client: openai.OpenAI, exported: Path) -> None:
    for samples in (wave(), wave(1.0, seed=1)):
        found = client.audio.transcriptions.create(model="any", file=("a.wav", wav(samples)))
        assert found.text == generated(exported, samples, TRANSCRIBE)
    text = client.audio.transcriptions.create(model="any", file=("a.wav", wav(wave())), response_format="text")
    assert text == generated(exported, wave(), TRANSCRIBE) + "\n"


def test_a_conversation_with_audio_in_two_turns_is_answered(client: openai.OpenAI) -> None:
    messages = [
        {"role": "user", "content": [block(wave()), {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, block(wave(seed=2))]},
    ]
    found = client.chat.completions.create(model="any", messages=messages)  # type: ignore[arg-type]
    assert len(found.earshot["routing"]) == 2  # type: ignore[attr-defined]


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "must be a list", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be a block", "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "%"}}]}]},
        "base64",
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA"}}]}]},
        "cannot be used",
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "http://a/b"}}]}]},
        "only data: URLs",
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": "a <audio> b"}]}, "stands for a clip", "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x"}] * 2}, "must be from the assistant", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}]}, "role", "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "empty", "messages"),
    ({"messages": [{"role": "user", "content": "a " * 100_000}]}, "characters, but the limit is", "messages"),
    (
        {"messages": [{"role": "user", "content": [block(wave())] * 257}]},
        "more than 256 clips",
        "messages[0].content[256]",
    ),
    ({"messages": [{"role": "user", "content": [hours_of_silence()] * 2}]}, "the limit is", "messages[0].content[1]"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": 0.7}, "greedily", "temperature"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "at least 1", "max_tokens"),
]


@pytest.mark.parametrize(("body", "message", "param"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_requests_are_refused_as_openai_does(
    client: openai.OpenAI, body: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value.body
    assert isinstance(error, dict) and message in error["message"] and error["param"] == param


def status_of(address: str, path: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(f"{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SEC) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        assert path == "/" or "error" in json.loads(error.read())
        return error.code


def test_what_is_not_allowed(address: str) -> None:
    allowed = {"Authorization": f"Bearer {KEY}"}
    assert status_of(address, "/v1/models") == 401
    assert status_of(address, "/v1/models", **allowed) == 200
    assert status_of(address, "/v1/models", **{"Authorization": "Bearer x"}) == 401
    assert status_of(address, "/v1/chat/completions", b"[" * 100000, **allowed) == 400
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert status_of(address, "/v1/chat/completions", surrogate, **allowed) == 400
    assert status_of(address, "/v1/models", **allowed, Origin="http://evil.example") == 403
    assert status_of(address, "/v1/models", **allowed, Origin=address) == 200
    assert status_of(address, "/v1/chat/completions", b"x" * (2**23 + 1), **allowed) == 413
    assert status_of(address, "/v1/nothing", **allowed) == 404
    assert status_of(address, "/", Host="evil.example") == 400


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread, and yield its address."""
    with serve._listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_SEC)


def test_text_is_streamed_while_it_is_generated_and_not_computed_for_a_client_that_is_gone(exported: Path) -> None:
    service = Service(exported, max_new_tokens=100)
    service._loaded.settings.eos_token_id = -1  # makes every answer 100 tokens long
    calls: list[float] = []

    def slow(*_: Any) -> None:
        calls.append(time.monotonic())
        time.sleep(0.02)

    service._loaded.model.llm.register_forward_pre_hook(slow)
    message: Any = {"role": "user", "content": [block(wave()), {"type": "text", "text": "what is it"}]}
    with serving(make_app(service, ("127.0.0.1",), None, 2**20)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=TIMEOUT_SEC, max_retries=0)
        whole = client.chat.completions.create(model="any", messages=[message]).choices[0].message.content
        assert len(calls) == 100 and whole is not None
        calls.clear()
        seen = []  # the parts of the text, each with the number of tokens generated before it arrived
        for chunk in client.chat.completions.create(model="any", messages=[message], stream=True):
            if chunk.choices[0].delta.content:
                seen.append((chunk.choices[0].delta.content, len(calls)))
        assert "".join(part for part, _ in seen) == whole
        assert len(seen) > 10 and seen[0][1] < 50 and len(calls) == 100
        for streams in (True, False):
            calls.clear()
            if streams:
                stream = client.chat.completions.create(model="any", messages=[message], stream=True)
                next(iter(stream))
                stream.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    client.with_options(timeout=0.3).chat.completions.create(model="any", messages=[message])
            time.sleep(0.5)
            while calls and time.monotonic() - calls[-1] < 0.5:
                time.sleep(0.05)
            assert len(calls) < 90, streams
        short = client.chat.completions.create(model="any", messages=[message], max_tokens=2)
        assert whole.startswith(short.choices[0].message.content or "")


def test_a_server_that_ends_stops_computing() -> None:
    started, ended, seen = threading.Event(), threading.Event(), []

    class Connected:
        async def is_disconnected(self) -> bool:
            return False

    def work(gone: threading.Event) -> None:
        started.set()
        seen.append(gone.wait(1))
        ended.set()

    async def main() -> None:
        task = asyncio.create_task(_Queue().run(cast(Request, Connected()), work))
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        await asyncio.to_thread(ended.wait, 5)

    asyncio.run(main())
    assert seen == [True]


def test_a_client_that_is_gone_does_not_wait_for_its_turn() -> None:
    started, free = threading.Event(), threading.Event()

    class Client:
        def __init__(self, is_gone: bool) -> None:
            self._is_gone = is_gone

        async def is_disconnected(self) -> bool:
            return self._is_gone

    def work(gone: threading.Event) -> bool:
        started.set()
        return free.wait(5)

    async def main() -> None:
        queue = _Queue()
        first = asyncio.create_task(queue.run(cast(Request, Client(False)), work))
        await asyncio.to_thread(started.wait, 5)
        with pytest.raises(RequestError, match="has closed the connection"):
            await asyncio.wait_for(queue.run(cast(Request, Client(True)), work), 2)
        third = asyncio.create_task(queue.run(cast(Request, Client(False)), work))
        free.set()
        assert await first and await third

    asyncio.run(main())


def test_a_slow_upload_is_refused_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.app.MAX_WAITING", 1)
    app = make_app(cast(Service, SimpleNamespace(name="none")), ("127.0.0.1",), None, 2**20, max_upload_sec=0.5)
    with serving(app) as address:
        for path in ("chat/completions", "audio/transcriptions"):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), TIMEOUT_SEC) as slow:
                kind = "multipart/form-data; boundary=x" if path.startswith("audio") else "application/json"
                head = (
                    f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 9\r\n\r\n"
                )
                slow.sendall(head.encode() + b"-")
                answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes the connection
            assert answer.startswith(b"HTTP/1.1 408") and b"more than 0.5 s to arrive" in answer, path
        assert status_of(address, "/v1/chat/completions", b"[") == 400  # 503 would mean that the place is not free


def test_parts_of_a_text_are_never_taken_back() -> None:
    parts: list[str] = []
    text = _Text(parts.append)
    for so_far in ("Yes", "Yes 's", "Yes's it", "Yes's it ,", "Yes's it, caf\ufffd", "Yes's it, café"):
        text.extend(so_far)
    text.finish("Yes's it, café!")
    assert "".join(parts) == "Yes's it, café!" and len(parts) > 1 and not any("\ufffd" in part for part in parts)


def test_invalid_bytes_after_a_character_do_not_end_the_stream() -> None:
    parts: list[str] = []
    text = _Text(parts.append)
    tokens = ["abcd", "<0xE4>", "<0xBD>", "<0xA0>", "<0xE5>", "x"]
    texts = [ByteFallback().decode(tokens[:num]) for num in range(1, len(tokens) + 1)]
    for so_far in texts:
        text.extend(so_far)
    text.finish(texts[-1])
    assert parts == ["abcd", "你", "\ufffd\ufffd\ufffd\ufffdx"]


DRIVE = """
(async () => {
  const bytes = Uint8Array.from(atob("AUDIO"), (c) => c.charCodeAt(0));
  await take(new Blob([bytes]), "a.wav");
  document.getElementById("prompt").value = "what is it";
  await send();
  document.getElementById("prompt").value = "an <audio> tag";
  await send();
})();
"""


@pytest.mark.slow
def test_the_page_answers_in_a_browser(exported: Path, tmp_path: Path) -> None:
    need_chromium()
    service = Service(exported)
    app = make_app(service, ("127.0.0.1",), None, 2**20)
    plain = TestClient(app, base_url="http://127.0.0.1").get("/").text
    driven = plain.replace(
        "</html>", f"<script>{DRIVE.replace('AUDIO', base64.b64encode(wav(wave())).decode())}</script>"
    )
    app.add_api_route("/driven", lambda: HTMLResponse(driven))
    with serving(app) as address:
        page = browse_url(f"{address}/driven", tmp_path)
    assert page.root["data-errors"] == ""
    answer = generated(exported, wave(), "what is it")
    assert html.escape(answer, quote=False) in page.dom and "data-expert=" in page.dom and "0.5 s of audio" in page.dom
    assert page.dom.count('class="reply"') == 1 and "which stands for a clip" in page.dom  # one message was refused


def test_user_errors_are_one_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert serve.main([str(exported), "--port", "70000"]) == 2
    assert serve.main([str(exported), "--port", "0", "--max-new-tokens", "0"]) == 2
    assert serve.main([str(exported), "--port", "0", "--host", "a" * 64]) == 2
    assert serve.main([str(exported), "--port", "0", "--allow-host", "a*"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
