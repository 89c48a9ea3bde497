# SPDX-License-Identifier: Apache-2.0
"""The server's life, with a small HTTP server in vLLM's place: it starts, fails, is stopped."""

import socket
import sys
import time

import pytest

from tools import layout, process, server
from tools.console import ToolError
from tools.server import Server

# Takes vLLM's arguments, answers as vLLM does, and has a child as vLLM has.
FAKE_VLLM = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
print("started with", sys.argv[1:], flush=True)
mode = os.environ.get("FAKE_MODE", "")
if mode == "dies":
    print("INFO loading")
    print("ERROR 11-21 [core.py:1] ValueError: no such model")
    sys.exit(7)
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
if mode == "hangs":
    time.sleep(60)
class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer(200, {{}})
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["prompt"] == "die":
            os._exit(9)
        if request["prompt"] == "refuse":
            self.answer(400, {{"error": "too long"}})
            return
        self.answer(200, {{"choices": [{{"text": " Paris."}}], "request": request}})
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def make_server(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BUILD", tmp_path)
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    script = binaries / "vllm"
    script.write_text(FAKE_VLLM.format(python=sys.executable))
    script.chmod(0o755)

    def make(mode="", **options):
        settings = {"FAKE_MODE": mode}
        log = tmp_path / "logs" / "server.log"
        return Server("model", log=log, venv=tmp_path / "venv", settings=settings, **options)

    return make


def group_of(running):
    return running._process.pid


def test_it_answers_on_loopback_and_is_gone_afterwards(make_server):
    with make_server(arguments=["--max-model-len", "64"]) as running:
        group = group_of(running)
        answer = running.complete("The capital of France is", max_tokens=3)
        assert answer["choices"][0]["text"] == " Paris."
        assert answer["request"]["temperature"] == 0
        assert answer["request"]["model"] == "model"
        assert running.url.startswith("http://127.0.0.1:")
        assert "'--max-model-len', '64'" in running.log.read_text()
        assert len(process.group_members(group)) == 2
    assert process.group_members(group) == []


def test_a_server_that_dies_shows_its_error_lines(make_server):
    running = make_server("dies")
    with pytest.raises(ToolError, match="ended with exit status 7") as error:
        running.__enter__()
    assert "ValueError: no such model" in str(error.value)
    assert "INFO" not in str(error.value)


def test_a_server_that_never_answers_is_stopped(make_server, monkeypatch):
    running = make_server("hangs")
    groups = []
    real_start = server.start

    def remember(*args, **kwargs):
        child = real_start(*args, **kwargs)
        groups.append(child.pid)
        return child

    monkeypatch.setattr(server, "start", remember)
    monkeypatch.setattr(Server.wait_until_healthy, "__defaults__", (1.0,))
    with pytest.raises(ToolError, match="did not answer in 1 s"):
        running.__enter__()
    assert process.group_members(groups[0]) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_while_waiting_leaves_nothing(make_server, monkeypatch, error):
    running = make_server("hangs")
    groups = []

    def interrupted(self):
        groups.append(group_of(self))
        raise error

    monkeypatch.setattr(Server, "wait_until_healthy", interrupted)
    with pytest.raises(error):
        running.__enter__()
    assert process.group_members(groups[0]) == []


def test_a_server_killed_in_between_is_reported(make_server):
    with make_server() as running:
        with pytest.raises(ToolError, match=r"did not answer|ended with exit status 9"):
            running.complete("die")
        running._process.wait()
        with pytest.raises(ToolError, match="ended with exit status 9"):
            running.check_alive()


def test_a_refused_request_carries_the_servers_reason(make_server):
    with make_server() as running, pytest.raises(ToolError, match=r"\(400\).*too long"):
        running.complete("refuse")


def test_a_proxy_is_not_asked_for_the_loopback(make_server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with make_server() as running:
        assert running.complete("x")["choices"]


def test_a_port_in_use_is_refused_before_anything_starts(make_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ToolError, match=f"port {port} of 127.0.0.1 cannot be used"):
            make_server(port=port).__enter__()
    with pytest.raises(ToolError, match="port 70000"):
        server.check_port(70000)


def test_free_ports_are_free():
    server.check_port(server.free_port())


def test_the_server_is_offline_and_keeps_its_caches_in_the_tree(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    environment = server.server_environment({"VLLM_PLUGIN_TM": "1"})
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_PLUGIN_TM"] == "1"
    for name in ("HF_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "XDG_CACHE_HOME"):
        assert environment[name].startswith(str(layout.CACHE))


def test_stopping_twice_is_fine(make_server):
    with make_server() as running:
        running.stop()
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 1
        with pytest.raises(ToolError, match="is not running"):
            running.check_alive()
