"""A real endpoint: `transformers serve` in a process of its own, on a loopback port.

It loads the folder that a request names, so that `server` + "#" + FOLDER is an endpoint for any model that was saved
with a chat template; `served_demo` is the demo's base model, saved as a training run saves one (`chat_folder`). A test
module imports the fixtures it needs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.model import prepare_for_chat
from recipe.templates import load_template

READY_IN = 60  # seconds; an idle machine takes 10


@contextmanager
def serve(log: Path) -> Iterator[str]:
    """Run the server until the block ends; yields its address, `http://127.0.0.1:PORT/v1`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + READY_IN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"`transformers serve` ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"`transformers serve` was not ready in {READY_IN} s:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model as a training run saves one: with the Alpaca template, padding and greedy decoding."""
    folder = tmp_path_factory.mktemp("served") / "demo"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO / "base"), AutoTokenizer.from_pretrained(DEMO / "base")
    prepare_for_chat(model, tokenizer, load_template("alpaca"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running `transformers serve`."""
    with serve(tmp_path_factory.mktemp("log") / "serve.log") as address:
        yield address


@pytest.fixture(scope="session")
def served_demo(server: str, chat_folder: Path) -> str:
    """The endpoint that answers with `chat_folder`."""
    return f"{server}#{chat_folder}"
