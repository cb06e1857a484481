"""The API, as clients meet it."""

import json

import httpx
import openai
import pytest
from serving import SECONDS, served, wait_for

import elf_rt

PROMPTS = ["the meeting starts at quarter past three", "tina paid nine hundred dollars for the chair"]


@pytest.fixture(scope="module")
def model(bundle):
    with elf_rt.load(bundle("spoken-to-written"), "onnxruntime", threads=1, max_rows=4) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=SECONDS, max_retries=0) as client:
        yield client


def ask(server, **body):
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)


def refusal(answer, status):
    """The error of an answer, which must be OpenAI's envelope and tell nothing of the inside."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in answer.text
    return error


def test_openai_client_gets_what_the_model_writes(client, model):
    (expected,) = model.generate(PROMPTS[0], seed=7, steps=4)
    answer = client.completions.create(model=model.bundle.name, prompt=PROMPTS[0], seed=7, extra_body={"steps": 4})
    (choice,) = answer.choices
    assert (choice.text, choice.index, choice.finish_reason) == (expected.text, 0, "stop")
    assert answer.usage.completion_tokens == (expected.ids != 0).sum() and answer.usage.prompt_tokens > 5
    assert answer.system_fingerprint.endswith("-onnxruntime-fp32")
    assert choice.timings["calls"] == 5 and choice.timings["predicted_ms"] > 0


def test_prompts_and_n_have_the_seeds_of_generate(client, model):
    expected = model.generate(PROMPTS, n=2, seed=3, steps=2)
    answer = client.completions.create(model=model.bundle.name, prompt=PROMPTS, n=2, seed=3, extra_body={"steps": 2})
    assert [(c.text, c.index, c.seed) for c in answer.choices] == [(r.text, k, r.seed) for k, r in enumerate(expected)]


def test_openai_client_streams_whole_texts(client, model):
    expected = model.generate(PROMPTS[0], n=2, seed=7, steps=3)
    events = list(
        client.completions.create(
            model=model.bundle.name, prompt=PROMPTS[0], n=2, seed=7, stream=True, extra_body={"steps": 3},
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert {event.choices[0].index: event.choices[0].text for event in events[:-1]} == dict(
        enumerate(result.text for result in expected)
    )
    assert len(events) == 3 and not events[-1].choices and events[-1].usage == events[-2].usage


def test_drafts_are_those_of_the_model(client, model):
    pending = model.submit(elf_rt.Text(PROMPTS[0], 7, params=model.params(steps=6)), drafts_every=2)
    expected = [(draft.step, draft.texts[0]) for draft in pending]
    events = list(
        client.completions.create(
            model=model.bundle.name, prompt=PROMPTS[0], seed=7, stream=True,
            extra_body={"steps": 6, "diffusing": True, "drafts_every": 2},
        )
    )  # fmt: skip
    assert [(event.step, event.choices[0].text) for event in events[:-1]] == expected and len(expected) == 2
    assert all(event.steps == 6 and 0 < event.t < 1 for event in events[:-1])
    assert events[-1].choices[0].text == pending.result().text and events[-1].choices[0].finish_reason == "stop"


def test_a_stream_is_events_and_ends_with_done(server):
    body = {"prompt": PROMPTS[0], "steps": 2, "stream": True}
    answer = ask(server, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def test_template_suffix_and_cut(server, model):
    template = "She paid [4] for the chair."
    (expected,) = model.generate(PROMPTS[1], seed=1, steps=2, pinned=template)
    body = {"prompt": PROMPTS[1], "seed": 1, "steps": 2}
    assert ask(server, **body, template=template).json()["choices"][0]["text"] == expected.text
    (whole,) = model.generate(PROMPTS[1], seed=1, steps=2, pinned="[6] for the chair.")
    before = ask(server, **body, suffix=" for the chair.", max_tokens=6).json()["choices"][0]
    assert before["text"] == model.codec.decode(whole.ids[:6]) and before["finish_reason"] == "length"


def test_models_and_fields_that_others_send(server, model):
    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert card["id"] == model.bundle.name and card["conditional"] and "default" in card["presets"]
    assert httpx.get(f"{server.url}/v1/models/{card['id']}").json() == card
    neutral = {"logprobs": None, "top_p": 1, "best_of": 1, "echo": False, "stop": None, "user": "u", "temperature": 1.0}
    assert ask(server, prompt="a", num_denoising_steps=2, **neutral).json()["choices"][0]["timings"]["calls"] == 3


@pytest.mark.parametrize(
    "body, status, code, words",
    [
        ({"prompt": "a", "logprobs": 3}, 400, "unsupported_parameter", "logprobs has no meaning here"),
        ({"prompt": "a", "tools": [{}]}, 400, "unsupported_parameter", "calls nothing"),
        ({"prompt": "a", "stepz": 3}, 400, "invalid_value", "stepz"),
        ({"prompt": "a", "steps": 0}, 400, "invalid_value", "steps"),
        ({"prompt": "a", "steps": 10_001}, 400, "invalid_value", "between 1 and 10000"),
        ({"prompt": "a", "steps": "4"}, 400, "invalid_value", "steps"),
        ({"prompt": "a", "n": True}, 400, "invalid_value", "n"),
        ({"prompt": "a", "n": 129}, 400, "invalid_value", "128"),
        ({"prompt": ["a"] * 100, "n": 2}, 400, "invalid_value", "at most 128"),
        ({"prompt": []}, 400, "invalid_value", "prompt"),
        ({"prompt": "a", "seed": 2**64}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 2**64 - 1, "n": 2}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "length": 65}, 400, "invalid_value", "between 1 and 64"),
        ({"prompt": "word " * 100}, 400, "context_length_exceeded", "this model reads 32"),
        ({"prompt": "a", "preset": "best"}, 400, "invalid_value", "preset must be one of"),
        ({"prompt": "a", "sampler": "euler"}, 400, "invalid_value", "sampler must be one of"),
        ({"prompt": "a", "template": "no blank \ud800"}, 400, "invalid_value", "template"),
        ({"prompt": "a", "diffusing": True}, 400, "invalid_value", "needs stream"),
        ({"prompt": "a", "suffix": "b"}, 400, "invalid_value", "max_tokens"),
        ({"prompt": "a", "model": "gpt"}, 404, "model_not_found", "not 'gpt'"),
        ({"prompt": "a", "steps": 9999, "deadline_ms": 1}, 504, "deadline", "this would take"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(server, body, status, code, words):
    error = refusal(httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=JSON), status)
    assert error["code"] == code and words in error["message"]


JSON = {"Content-Type": "application/json"}


def test_other_paths_and_methods(server):
    assert "has no chat" in refusal(httpx.post(f"{server.url}/v1/chat/completions", json={}), 400)["message"]
    refusal(httpx.get(f"{server.url}/v1/nothing"), 404)
    refusal(httpx.get(f"{server.url}/v1/completions"), 405)
    refusal(httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a', headers=JSON), 400)
    refusal(httpx.post(f"{server.url}/v1/completions", content=b" " * (1 << 20) + b" ", headers=JSON), 413)
    assert httpx.get(f"{server.url}/health").json() == {"status": "alive"}
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)


def test_a_deadline_that_will_be_met_is_met(server):
    choice = ask(server, prompt="a", steps=2, deadline_ms=60_000).json()["choices"][0]
    assert choice["timings"]["predicted_ms"] < 60_000


def test_metrics_count(server):
    before = server.metrics()
    answer = ask(server, prompt="a", steps=3, n=2).json()
    after = server.metrics()

    def grown(name):
        return after[name] - before.get(name, 0.0)

    assert grown("elf_rt_text_seconds_count") == grown("elf_rt_queue_seconds_count") == 2
    assert grown("elf_rt_prediction_error_ratio_count") == 2
    assert grown("elf_rt_completion_tokens_total") == answer["usage"]["completion_tokens"]
    assert grown("elf_rt_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown('elf_rt_http_requests_total{status="200"}') >= 1 and grown("elf_rt_calls_total") >= 4
    assert after['elf_rt_call_milliseconds{rows="4"}'] > 0 and after["elf_rt_call_rows_max"] <= 4


def test_a_full_queue_says_when_to_come_again(model):
    with served(model, max_waiting=0) as server:
        body = {"prompt": "a", "steps": 10_000, "n": 128, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS) as held:
            assert held.status_code == 200
            answer = ask(server, prompt="a", steps=1)
            assert refusal(answer, 429)["code"] == "queue_full"
            rows, calls = 2 * 128, 10_000
            least = 0.2 * 1e-3 * model.stats().call_ms[4] / 4 * rows * calls
            assert int(answer.headers["retry-after"]) > least
        wait_for(lambda: ask(server, prompt="a", steps=1).status_code == 200, "room again")
        assert server.metrics()['elf_rt_texts_rejected_total{code="queue_full"}'] >= 1


def test_api_keys(model):
    with served(model, keys=["first", "second"]) as server:
        refusal(ask(server, prompt="a"), 401)
        for key, status in (("second", 200), ("firs", 401), ("x", 401), ("first second", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/").status_code == 200


def test_other_origins_may_ask_only_where_they_are_named(model, server):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with served(model, keys=["first"], origins=["https://a.example"]) as named:
        for each, wanted in ((named, "https://a.example"), (server, None)):
            answer = httpx.options(f"{each.url}/v1/completions", headers=preflight)
            assert answer.headers.get("access-control-allow-origin") == wanted


def test_the_page_asks_its_own_server_only(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "//" not in "".join(part for part in answer.text.split('"') if part.startswith(("http", "//")))


def test_short_texts_pass_long_ones(server, model):
    """A text of 4 steps returns before any of 32 texts of 1000 steps that came before it."""
    body = {"prompt": "a", "steps": 1000, "n": 32, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS):
        wait_for(lambda: model.stats().slots == 32, "texts in flight")
        assert ask(server, prompt="a", steps=4).status_code == 200
        assert model.stats().slots == 32  # none of them is written yet
    server.until(texts_running=0)
