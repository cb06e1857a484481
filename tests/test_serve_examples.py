"""The programs in examples/, run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import SECONDS, wait_for

import elf_rt

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = ["tina paid nine hundred dollars for the chair", "please call noah at five twenty in the afternoon"]


@pytest.fixture(scope="module")
def expected(bundle):
    with elf_rt.load(bundle("spoken-to-written")) as model:
        return [model.generate(prompt, seed=0, steps=8)[0].text for prompt in PROMPTS]


def test_threads(bundle, expected):
    command = [sys.executable, EXAMPLES / "threads.py", bundle("spoken-to-written")]
    done = subprocess.run(command, input="\n".join(PROMPTS), capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.splitlines() == expected, done.stderr


def test_fastapi_app(bundle, expected, monkeypatch):
    monkeypatch.setenv("BUNDLE", str(bundle("spoken-to-written")))
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--port", "0"]
    with subprocess.Popen(command, cwd=EXAMPLES, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
            wait_for(lambda: httpx.get(f"{url}/openapi.json").status_code == 200, "an answer")
            texts = [
                httpx.get(f"{url}/write", params={"prompt": prompt}, timeout=SECONDS).json()["text"]
                for prompt in PROMPTS
            ]
            assert texts == expected
        finally:
            server.terminate()
