"""The Python API on the demo models."""

import multiprocessing
import pickle
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import elf_rt
from elf_rt import backends
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, InputError
from elf_rt.machine import cores
from elf_rt.model import Draft, Text
from elf_rt.sampling.noise import normal

SPOKEN = [
    "tina paid nine thousand three hundred and fifty dollars for the chair",
    "the train leaves at five past nine",
]


@pytest.fixture(scope="module")
def shakespeare(bundle):
    with elf_rt.load(bundle("shakespeare"), "onnxruntime") as model:
        yield model


@pytest.fixture(scope="module")
def spoken(bundle):
    with elf_rt.load(bundle("spoken-to-written"), "onnxruntime") as model:
        yield model


def test_a_text_depends_on_its_seed_alone(shakespeare):
    """n = 1, n = 8, and inside a batch of 64; the seed of each result gives it again by itself."""
    batch = shakespeare.generate(n=64, seed=100, steps=4)
    eight = shakespeare.generate(n=8, seed=130, steps=4)
    alone = shakespeare.generate(seed=133, steps=4)
    assert [r.seed for r in eight] == list(range(130, 138))
    assert [r.text for r in eight] == [r.text for r in batch[30:38]]
    assert alone[0].text == eight[3].text
    assert len({r.text for r in batch}) == 64


def test_prompts_share_nothing(spoken):
    together = spoken.generate([*SPOKEN, SPOKEN[0]], seed=7, steps=4)
    apart = [spoken.generate(p, seed=7 + i, steps=4)[0] for i, p in enumerate([*SPOKEN, SPOKEN[0]])]
    assert [r.text for r in together] == [r.text for r in apart]
    assert [r.prompt for r in together] == [*SPOKEN, SPOKEN[0]]
    several = spoken.generate(SPOKEN, n=2, seed=7, steps=4)
    assert [r.prompt for r in several] == [SPOKEN[0]] * 2 + [SPOKEN[1]] * 2


def test_a_prompt_is_encoded_once_and_by_itself(bundle, monkeypatch):
    """However many texts it gets, and from whatever call: an encoder that is a network takes as long as some steps."""
    with elf_rt.load(bundle("spoken-to-written"), "onnxruntime") as model:
        asked = []
        encode = model.codec._encode
        monkeypatch.setattr(model.codec, "_encode", lambda ids, mask: asked.append(ids.tolist()) or encode(ids, mask))
        model.generate(SPOKEN, n=3, steps=1)
        for pending in [model.submit(Text(prompt, seed)) for seed in range(3) for prompt in SPOKEN]:
            pending.cancel()
        assert asked == [[ids] for ids in model.codec.tokenize(SPOKEN)]


def test_spoken_becomes_written(spoken):
    assert spoken.generate(SPOKEN[0], seed=0, steps=8)[0].text == "Tina paid $9350 for the chair."


def test_few_rows_a_call_give_the_same_texts(bundle, shakespeare):
    want = [r.text for r in shakespeare.generate(n=5, seed=0, steps=2)]
    with elf_rt.load(bundle("shakespeare"), "onnxruntime", max_rows=2) as model:
        assert [r.text for r in model.generate(n=5, seed=0, steps=2)] == want
        assert model.stats().max_rows <= 2 and set(model.stats().call_ms) <= {1, 2}


def test_stream_drafts_and_ends_with_the_same_text(spoken):
    events = list(spoken.stream(SPOKEN[0], seed=3, steps=8, drafts_every=3))
    drafts, results = events[:-1], events[-1]
    assert [d.step for d in drafts] == list(range(1, 9)) and all(isinstance(d, Draft) for d in drafts)
    assert [d.step for d in drafts if d.texts is not None] == [3, 6]
    assert np.all(np.diff([d.t for d in drafts]) >= 0)
    assert results[0].text == spoken.generate(SPOKEN[0], seed=3, steps=8)[0].text


def test_a_cancelled_stream_gives_its_slot_back(spoken):
    before = spoken.generate(SPOKEN[0], seed=1, steps=4)[0].text
    cancelled = spoken.stats().cancelled
    for _ in range(12):
        stream = spoken.stream(SPOKEN[0], seed=2, steps=8)
        next(stream)
        stream.close()
    assert spoken.generate(SPOKEN[0], seed=1, steps=4)[0].text == before
    stats = spoken.stats()
    assert (stats.slots, stats.waiting) == (0, 0)
    assert stats.cancelled > cancelled


def test_different_texts_side_by_side(spoken):
    """Each as it is alone: other steps, guidance, sampler, length and pins beside it change nothing."""
    texts = [
        Text(SPOKEN[0], seed=1, params=spoken.params(steps=3)),
        Text(SPOKEN[1], seed=2, params=spoken.params(steps=6, guidance_scale=2.0, sampler="ode")),
        Text(None, seed=3, params=spoken.params(steps=2), pinned="The train to [2] leaves at [5]."),
        Text(SPOKEN[1], seed=4, params=spoken.params(steps=4), length=48),
        Text(SPOKEN[0], seed=5),
    ]
    with pytest.warns(UserWarning, match="trained on 64"):
        together = spoken.write(texts)
        alone = [spoken.write([text])[0] for text in texts]
    for a, b, text in zip(together, alone, texts, strict=True):
        assert np.array_equal(a.ids, b.ids) and (a.seed, a.prompt) == (text.seed, text.prompt)
    assert spoken.write([]) == []


def test_threads_share_a_model(spoken):
    want = [spoken.generate(SPOKEN[i % 2], seed=i, steps=3)[0].text for i in range(8)]
    got: list[str | None] = [None] * 8

    def work(i):
        got[i] = spoken.generate(SPOKEN[i % 2], seed=i, steps=3)[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_noise_of_a_step_is_philox_of_the_seed(shakespeare):
    """What the sampler draws by itself is what a caller can draw and hand in."""
    shape = (shakespeare.config.max_length, shakespeare.config.latent_dim)
    seeds, params = np.array([11, 12], np.uint64), shakespeare.params(steps=3)
    z0 = shakespeare.config.noise_scale * normal(seeds, 0, shape)
    eps = np.stack([normal(seeds, i + 1, shape) for i in range(3)])
    given = shakespeare.sample(z0=z0, eps=eps, seeds=seeds, params=params)
    drawn = shakespeare.sample(seeds=seeds, params=params)
    np.testing.assert_array_equal(given.latents, drawn.latents)


def test_timings_add_up(spoken):
    for result in spoken.generate(SPOKEN, seed=0, steps=4):
        timings = result.timings
        assert timings.calls == 5
        assert timings.waited_ms >= 0 and min(timings.network_ms, timings.integrator_ms) > 0
        assert timings.waited_ms + timings.network_ms + timings.integrator_ms <= timings.total_ms


def test_a_warm_model_knows_what_its_calls_cost(bundle):
    with elf_rt.load(bundle("uncond"), "onnxruntime", max_rows=4) as model:
        assert not model.stats().settled and not model.stats().call_ms
        model.warm_up()
        assert model.stats().settled and {1, 2} <= model.stats().call_ms.keys()


def test_a_long_prompt_is_cut_with_a_warning(spoken):
    with pytest.warns(UserWarning, match="is cut to 32"):
        spoken.generate("one hundred " * 40, seed=0, steps=1)


def test_another_length_warns(shakespeare):
    with pytest.warns(UserWarning, match="trained on 128"):
        result = shakespeare.generate(seed=0, steps=1, length=40)
    assert result[0].ids.shape == (40,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shakespeare.generate(seed=0, steps=1, length=128)


def test_a_short_canvas_says_how_much_it_leaves(spoken):
    """The places of the longest source stay free, as in the official sampler, however short the prompt is."""
    for length, left in ((33, 1), (40, 8), (20, 1)):
        with pytest.warns(UserWarning, match=f"a length of {length} cuts texts to {left} tokens, for 32 are kept"):
            (result,) = spoken.generate("it costs five pounds", seed=0, steps=1, length=length)
        assert len(result.ids) == left


def test_warnings_name_the_line_that_asked(spoken, tmp_path):
    """Not one inside elf_rt, however deep the reason lies."""
    for arguments in ({"prompts": "one hundred " * 40}, {"prompts": "a", "length": 40}):
        for call in (spoken.generate, lambda **given: list(spoken.stream(**given))):
            with pytest.warns(UserWarning) as told:
                call(**arguments, seed=0, steps=1)
            assert {warning.filename for warning in told} == {__file__}


def test_a_pickled_model_is_opened_again(bundle, tmp_path, monkeypatch):
    """As the argument of a spawned process, wherever that runs."""
    monkeypatch.chdir(bundle("spoken-to-written").parent)
    with elf_rt.load("spoken-to-written.elfrt", "onnxruntime", threads=1) as model:
        want = model.generate(SPOKEN[0], seed=3, steps=2)[0].text
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(write, model).result() == want
        monkeypatch.chdir(tmp_path)
        with pickle.loads(pickle.dumps(model)) as again:
            assert again.generate(SPOKEN[0], seed=3, steps=2)[0].text == want
            assert again.backend.describe() == model.backend.describe()
    with pytest.raises(BackendError, match="the model is closed"):
        pickle.dumps(model)


def write(model: elf_rt.Model) -> str | None:
    with model:
        return model.generate(SPOKEN[0], seed=3, steps=2)[0].text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number, 1 or more"),
        ({"seed": -1}, "seed must be a whole number between"),
        ({"seed": 2**64}, "seed must be a whole number between"),
        ({"steps": 0}, "steps must be between"),
        ({"length": 129}, "length must be a whole number between 1 and 128"),
        ({"preset": "best"}, "preset must be one of default"),
        ({"cfg": 2}, "must be one of steps"),
        ({"prompts": ""}, "no token"),
    ],
)
def test_bad_arguments(shakespeare, arguments, message):
    with pytest.raises(InputError, match=message):
        shakespeare.generate(**arguments)


def test_an_unconditional_model_takes_no_prompt(bundle):
    with elf_rt.load(bundle("uncond")) as model:
        with pytest.raises(InputError, match="takes no prompt"):
            model.generate("hello")
        assert model.generate(steps=1)[0].text is None


def test_unknown_backends_and_precisions(bundle):
    with pytest.raises(InputError, match="backend must be one of auto, "):
        elf_rt.load(bundle("uncond"), "jax")
    with pytest.raises((InputError, BackendError), match="fp4"):
        elf_rt.load(bundle("uncond"), precision="fp4")


@pytest.mark.parametrize("threads", [0, -1, 2.0, True, "2", 10**12, 4 * cores() + 1])
def test_threads_are_within_reason(bundle, threads):
    with pytest.raises(InputError, match=rf"threads must be a whole number between 1 and {4 * cores()} .*, got"):
        elf_rt.load(bundle("uncond"), threads=threads)


def test_threads_have_no_meaning_on_a_gpu(bundle, monkeypatch):
    gpu = SimpleNamespace(name="tensorrt", device="cuda", precision="fp32")
    monkeypatch.setattr(backends, "_open_best", lambda *_: (gpu, "why"))
    with pytest.warns(UserWarning, match="threads=1 has no meaning for tensorrt"):
        backends.open_backend(Bundle.open(bundle("uncond")), threads=1)


def test_a_closed_model_says_so(bundle):
    with elf_rt.load(bundle("uncond"), "onnxruntime") as model:
        pass
    model.close()
    with pytest.raises(BackendError, match="the model is closed"):
        model.generate(steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "4"}, "steps must be a number, got '4'"),
        ({"steps": 2.5}, "steps must be a number, got 2.5"),
        ({"steps": True}, "steps must be a number, got True"),
        ({"sampler": 1}, "sampler must be a text, got 1"),
        ({"n": "2"}, "n must be a whole number"),
        ({"n": True}, "n must be a whole number"),
        ({"length": 32.0}, "length must be a whole number between 1 and 64, got 32.0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"prompts": 5}, "prompts must be a text or a sequence of texts, got 5"),
        ({"prompts": ["fine", " \t\n "]}, "prompt 2 has no token in it"),
        ({"prompts": [None]}, "prompt 1 is not a text in UTF-8: None"),
        ({"prompts": ["fine", "\ud800"]}, "prompt 2 is not a text in UTF-8"),
        ({"pinned": "no blanks"}, "a template needs a blank such as"),
    ],
)
def test_values_of_another_kind(spoken, arguments, message):
    with pytest.raises(InputError, match=message):
        spoken.generate(**arguments)


def test_pinned_tokens_come_back_verbatim(spoken):
    pinned = {0: "We", 3: 20}
    for result in spoken.generate(pinned=pinned, n=4, seed=1, steps=4):
        assert result.ids[0] == spoken.codec.tokenizer.encode("We")[0][0] and result.ids[3] == 20
    results = spoken.generate(pinned="The train to [2] leaves at [5].", n=4, seed=0, steps=4)
    assert all(r.text.startswith("The train to") and r.text.endswith(".") for r in results)
    assert len({r.text for r in results}) > 1
    after = spoken.generate(SPOKEN[0], pinned={0: "We"}, seed=0, steps=4)[0]
    assert after.text.startswith("We")


def test_a_text_does_not_end_before_its_last_pin(spoken):
    """Given a blank with more room than it needs, the model writes an EOS into it."""
    for template, prompt in (("She paid [12] for the chair.", SPOKEN[0]), ("I saw [20] on monday.", None)):
        head, tail = template.split(" [")[0], template.split("]")[1]
        for result in spoken.generate(prompt, pinned=template, n=8, seed=0, steps=4):
            assert result.text.startswith(head) and result.text.endswith(tail), result.text
    room = spoken.config.max_length - spoken.config.max_input_length
    last = spoken.generate(SPOKEN[0], pinned={room - 1: 20}, seed=0, steps=4)[0]
    assert len(last.ids) == room and last.ids[-1] == 20
    with pytest.raises(InputError, match=f"between 0 and {room - 1}, got {room}"):
        spoken.generate(SPOKEN[0], pinned={room: 20}, seed=0, steps=4)


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ({}, "nothing is pinned"),
        ({-1: 5}, "between 0 and 63"),
        ({0: 9999}, "between 0 and 511"),
        ("[99]", "blanks need 99"),
    ],
)
def test_bad_pins(spoken, pinned, message):
    with pytest.raises(InputError, match=message):
        spoken.generate(pinned=pinned, steps=1)


@pytest.mark.parametrize("drafts_every", [-1, 1.5])
def test_drafts_are_counted_in_whole_steps(spoken, drafts_every):
    with pytest.raises(InputError, match="drafts_every must be a whole number, 0 or more"):
        spoken.stream(drafts_every=drafts_every)  # at the call, not at the first next
    with pytest.raises(InputError, match="drafts_every must be a whole number, 0 or more"):
        spoken.submit(Text(SPOKEN[0]), drafts_every=drafts_every)


def test_sample_checks_what_it_is_given(spoken):
    config = spoken.config
    shape = (2, config.max_length, config.latent_dim)
    z0, params = np.zeros(shape, np.float32), spoken.params(sampler="sde", steps=3)
    mask = np.zeros(shape[:2], bool)
    assert spoken.sample(z0=z0, params=params).ids.shape == shape[:2]  # noise of one seed for both
    for given, message in (
        ({"eps": np.zeros((1, *shape), np.float32)}, r"eps must have shape \(2, 2, 64, \d+\), got \(1, 2, 64"),
        ({"eps": np.zeros((2, 1, *shape[1:]), np.float32)}, "eps must have shape"),
        ({"source": z0}, "source and mask go together"),
        ({"mask": mask}, "source and mask go together"),
        ({"source": z0, "mask": mask[:1]}, r"mask must have shape \(2, 64\), got \(1, 64\)"),
        ({"grid": np.array([[0, 0.5, 1]] * 3)}, r"grid must have shape \(2, 3\), got \(3, 3\)"),
        ({"seeds": [1, 2, 3]}, r"seeds must have shape \(2,\), got \(3,\)"),
    ):
        with pytest.raises(InputError, match=message):
            spoken.sample(z0=z0, params=params, **given)
    assert spoken.sample(z0=z0[:1].tolist(), params=params).latents.shape == (1, *shape[1:])
    for given, message in (
        ({"z0": z0[0]}, r"z0 must have shape \(any, any, \d+\), got \(64, \d+\)"),
        ({"z0": z0[:0]}, "at least one text"),
        ({"z0": z0 + 1j}, "z0 must hold numbers, got complex"),
        ({"z0": z0.astype("M8[s]")}, "z0 must hold numbers, got datetime"),
        ({"grid": ["a", "b"]}, "grid must hold numbers"),
        ({"grid": [[0, 1], [0, 0.5, 1]]}, "grid must be an array of numbers"),
        ({"params": {"steps": 2}}, "params must be SamplingParams"),
    ):
        with pytest.raises(InputError, match=message):
            spoken.sample(**given)


def test_other_kinds_of_arguments(spoken):
    first, again = (spoken.generate(SPOKEN[0], n=np.int64(1), seed=0, steps=1)[0] for _ in range(2))
    assert first == first and first != again and first in {first}  # arrays have no one truth of being equal
    for call, message in (
        (lambda: spoken.generate(SPOKEN[0], preset=["default"]), "preset must be one of"),
        (lambda: spoken.generate(SPOKEN[0], pinned=5), "pinned must be a template or"),
        (lambda: spoken.write(Text(SPOKEN[0])), "texts must be a sequence of elf_rt.Text"),
        (lambda: spoken.generate("a" * (10**6 + 1)), "prompt 1 has 1000001 characters: at most 1000000"),
    ):
        with pytest.raises(InputError, match=message):
            call()
