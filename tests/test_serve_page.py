"""The page, in a real browser: it writes, streams, runs back, compares, cancels, and asks nobody but its server.

ELF_RT_PICTURES=docs pytest tests/test_serve_page.py  takes the pictures of the docs anew.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import SECONDS, served

import elf_rt
from elf_rt.params import SamplingParams

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "please call noah at five twenty in the afternoon on saturday"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def server(bundle):
    with elf_rt.load(bundle("spoken-to-written"), "onnxruntime", threads=1, max_rows=4) as model:
        model.bundle.presets["fast"] = SamplingParams(steps=4, sampler="ode", guidance_scale=1.0, sc_cfg=1.0)
        with served(model) as server:
            yield server


@pytest.fixture(scope="module")
def shakespeare(bundle):
    with elf_rt.load(bundle("shakespeare"), "onnxruntime", threads=1, max_rows=4) as model:
        presets = json.loads((EXAMPLES / "shakespeare" / "presets.json").read_text(encoding="utf-8"))
        model.bundle.presets |= {name: SamplingParams(**values) for name, values in presets.items()}
        with served(model) as server:
            yield server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server):
    """The page when it has the model's names. Whatever it complains of, or asks elsewhere, is a failure."""
    context = browser.new_context(viewport={"width": 1280, "height": 840})
    context.set_default_timeout(1e3 * SECONDS)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if is_wrong(message) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not is_own(request.url, server) else None)
    page.goto(server.url)
    page.get_by_role("status").filter(has_text="ready").wait_for()
    yield page
    context.close()
    assert not complaints


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        page.get_by_label("Prompt").fill(PROMPT)
        yield page


def is_own(url, server):
    return url.startswith((f"{server.url}/", "data:,"))


def is_wrong(message):
    return message.type == "error" and "responded with a status of 400" not in message.text


def write(page, **fields):
    for label, value in fields.items():
        page.get_by_role("spinbutton", name=label.capitalize()).first.fill(str(value))
    page.get_by_role("button", name="Write").click()


def written(page, texts=1):
    page.wait_for_function("n => [...document.querySelectorAll('dd.ms')].filter(d => d.textContent != '–').length == n",
                           arg=texts)  # fmt: skip
    return page.locator("article .text").all_inner_texts()


def test_it_writes_what_the_model_writes_step_by_step(page, server):
    model = server.service.model
    pending = model.submit(
        elf_rt.Text("tina paid nine hundred dollars", 5, params=model.params(steps=6)), drafts_every=1
    )
    expected = [" ".join(draft.texts[0].split()) for draft in pending]
    page.get_by_label("Prompt").fill("tina paid nine hundred dollars")
    write(page, steps=6, seed=5)
    assert written(page) == [pending.result().text]
    slider = page.get_by_role("slider")
    assert slider.get_attribute("max") == "5"  # five drafts and the text
    slider.focus()
    for step in (5, 4, 3):
        page.keyboard.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext").startswith(f"Step {step} of 6")
        text = page.locator("article .text")
        assert " ".join(text.inner_text().split()) == expected[step - 1]
        marked = text.locator("mark").all_inner_texts()
        assert bool(marked) == (expected[step - 1] != expected[step - 2])


def test_a_template_and_the_keyboard(page):
    page.get_by_label("Template").fill("She paid [4] for the chair.")
    page.get_by_role("spinbutton", name="Steps").fill("2")
    page.keyboard.press("Control+Enter")
    (text,) = written(page)
    assert text.startswith("She paid") and text.endswith("for the chair.")


def test_two_settings_side_by_side(page, server):
    page.get_by_label("Two settings").check()
    write(page, steps=8)
    model = server.service.model
    texts = [model.generate(PROMPT, seed=0, **each)[0].text for each in ({"steps": 8}, {"preset": "fast"})]
    assert written(page, 2) == texts
    assert page.locator("legend").all_inner_texts() == ["Setting A", "Setting B"]
    assert page.locator("dd.calls").all_inner_texts() == ["16", "8"]  # steps, drafts, and the last one


def test_cancel_stops_the_text(page, server):
    write(page, steps=10_000)
    page.get_by_text(re.compile(r"Step \d+ of 10000")).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("status").filter(has_text="cancelled").wait_for()
    server.until(texts_running=0)
    assert page.locator("dd.ms").inner_text() == "–" and page.get_by_role("button", name="Write").is_enabled()


def test_errors_are_told(page):
    page.get_by_label("Prompt").fill("word " * 100)
    page.get_by_role("button", name="Write").click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "this model reads 32" in alert.inner_text()


def test_what_is_copied_runs(page, server, tmp_path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("Prompt").fill("it's three o'clock")
    page.get_by_role("spinbutton", name="Steps").fill("3")
    page.get_by_role("spinbutton", name="Seed").fill("9")
    (expected,) = server.service.model.generate("it's three o'clock", seed=9, steps=3)
    outputs = []
    for button, command in (("Copy as curl", ["sh", "-c"]), ("Copy as Python", [sys.executable, "-c"])):
        page.get_by_role("button", name=button).click()
        page.get_by_role("button", name="Copied").wait_for()
        page.get_by_role("button", name=button).wait_for()  # its name comes back
        code = page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run([*command, code], capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert json.loads(outputs[0])["choices"][0]["text"] == expected.text == outputs[1].strip()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(shakespeare, browser, scheme, tmp_path):
    """The pictures of the docs: a text that is half formed beside one that is written in few steps."""
    with opened(browser, shakespeare) as page:
        page.emulate_media(color_scheme=scheme)
        page.get_by_label("Two settings").check()
        write(page, seed=4)
        slow, fast = written(page, 2)
        assert len(slow) > 50 and len(fast) > 50
        slider = page.get_by_role("slider").first
        slider.fill("7")
        page.mouse.click(5, 5)
        assert 0 < page.locator("mark").count() < len(slow.split())
        page.screenshot(path=tmp_path / f"serve-{scheme}.png")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(246, 244, 239)" if scheme == "light" else "rgb(20, 22, 26)")
    if folder := os.environ.get("ELF_RT_PICTURES"):
        shutil.copy(tmp_path / f"serve-{scheme}.png", folder)
