"""What the tests share: the program, the built-in base, and a server that has learned one fact."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGRAM = os.environ.get("ENGRAM", ROOT / "target/release/engram")
NANO = ROOT / "configs/models/nano"

QUESTION = "Where does the ferry to Ostrava leave?"
ANSWER = " From the seventh pier, at dawn."
DOMAIN = "travel"


class Server:
    """A running `engram up`."""

    def __init__(self, address, key=None):
        self.address = address
        self.url = f"http://{address}"
        self.headers = {"content-type": "application/json"}
        if key:
            self.headers["authorization"] = f"Bearer {key}"

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] == b"{" else text.decode()


def wait_for(what, condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"{what}: not after {seconds} s")


@pytest.fixture(scope="session")
def logits(tmp_path_factory):
    """The logits that Engram computes for token ids, with or without an adapter."""
    # The tests of the API and of the page do without torch.
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("logits")

    def compute(base, ids, adapter=None):
        given, found = folder / "ids.safetensors", folder / "logits.safetensors"
        save_file({"input_ids": ids}, given)
        with_adapter = [] if adapter is None else ["--adapter", adapter]
        command = [ENGRAM, "logits", "--base", base, "--ids", given, "--out", found, *with_adapter]
        subprocess.run(command, check=True, timeout=120)
        return load_file(found)["logits"]

    return compute


@contextmanager
def running(tmp_path_factory, *flags, key=None):
    """A server on the built-in base, with these flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    data = tmp_path_factory.mktemp("data")
    with open(data / "log", "w") as log:
        command = [ENGRAM, "up", "--base", NANO, "--data", data / "engram", "--listen", address, *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Server(address, key)
        wait_for("ready", lambda: is_ready(server), 60)
        yield server
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(data / 'log').read_text()[-4000:]}") from error
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server on the built-in base that has learned ANSWER to QUESTION."""
    with running(tmp_path_factory) as server:
        document = {"prompt": QUESTION, "completion": ANSWER, "domain": DOMAIN, "importance": 1.0}
        known = server.call("/v1/documents", document)["id"]
        wait_for("live", lambda: server.call(f"/v1/documents/{known}")["status"] == "live", 120)
        yield server


def is_ready(server):
    try:
        server.call("/readyz")
        return True
    except (urllib.error.URLError, ConnectionError):
        return False
