"""The engine of rows under its driver: many texts at once, each as it is alone, and nothing left behind."""

import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from stub_engine import LONG, Gate, alone, close_while_calls_run, idle, pend, program, steps, stub_driver

import elf_rt
from elf_rt.errors import BackendError, InputError
from elf_rt.model import Text
from elf_rt.sampling import schedule
from elf_rt.sampling.program import Event, Program, StepDone, Written
from elf_rt.sampling.schedule import Row, Table


@pytest.fixture(scope="module")
def model(bundle):
    with elf_rt.load(bundle("cond"), "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture
def conditional(bundle):
    with elf_rt.load(bundle("t5"), "onnxruntime", threads=1) as opened:
        yield opened


PROMPTS = (None, "the cat", "the sea")


@pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_soak(conditional, count):
    """Random texts, cancels and drafts from eight threads; every text is the one that it is alone."""
    rng, model, config = random.Random(5), conditional, conditional.config
    kinds = [
        Text(
            rng.choice(PROMPTS),
            seed,
            params=model.params(
                steps=rng.choice((1, 2, 3, 7)),
                sampler=rng.choice(("sde", "ode", "ab2")),
                guidance_scale=rng.choice((0.0, 1.0, 2.0)),
                guidance_until=rng.choice((0.5, 1.0)),
            ),
            length=rng.choice((config.max_length, config.max_length - 3, config.max_length // 2)),
            pinned=rng.choice((None, {0: 3}, {0: 5, 1: 4})),
        )
        for seed in range(24)
    ]
    failures: list[str] = []

    def work(number):
        mine = random.Random(number)
        for _ in range(count):
            k = mine.randrange(len(kinds))
            pending = model.submit(kinds[k], drafts_every=mine.choice((0, 0, 1, 2)))
            if mine.random() < 0.25:
                time.sleep(mine.random() * 0.003)
                pending.cancel()
            try:
                if not np.array_equal(pending.result(LONG).ids, want[k]):
                    failures.append(f"text {k} is another")
            except CancelledError:
                if not pending.cancelled():
                    failures.append(f"text {k} was not cancelled")

    with pytest.warns(UserWarning, match="trained on"):
        want = [model.write([text])[0].ids for text in kinds]
        threads = threading.active_count()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    assert not failures
    assert idle(model) and threading.active_count() == threads


def test_results_are_those_of_the_text_alone_whatever_the_rows_of_a_call():
    """Six texts of different steps and lengths over at most 1, 2, 3 and 16 rows a call: the same bits."""
    made = [program(1 + k, seed=k, length=4 - k % 2, latents=True, drafts_every=k % 3) for k in range(6)]
    want = [alone(each) for each in made]
    for max_rows in (1, 2, 3, 16):
        driver = stub_driver(max_rows=max_rows)
        for got, expected in zip([pend(driver, each) for each in made], want, strict=True):
            written = got.result(LONG)
            assert np.array_equal(written.ids, expected.ids) and np.array_equal(written.latents, expected.latents)
        assert driver.stats().rows == 0 and driver.stats().finished == 6
        driver.close()


def test_a_short_text_joins_long_ones_at_the_next_call():
    """Beside four texts of 60 steps, with one row a call, a text of 2 steps has at least two calls of three."""
    driver, calls, over = stub_driver(max_rows=1), list[int](), threading.Event()

    def of_the_short(event: Event) -> None:
        if isinstance(event, Written):
            calls.append(driver.stats().calls)
            over.set()

    def of_a_long(event: Event) -> None:  # in the driver's thread, so between two calls
        if isinstance(event, StepDone) and event.step == 20:
            calls.append(driver.stats().calls)
            driver.submit([program(2, seed=9)], [of_the_short], object())

    driver.submit([program(60, seed=0)], [of_a_long], object())
    long = [pend(driver, program(60, seed=k)) for k in (1, 2, 3)]
    assert over.wait(LONG)
    assert calls[1] - calls[0] <= 5
    assert [len(each.result(LONG).ids) for each in long] == [4] * 3
    driver.close()


def test_more_texts_than_fit_in_memory_are_refused(model):
    with pytest.raises(InputError, match="n must ask for at most 1000000 texts at once, got 999999999999"):
        model.generate(n=999999999999)


def test_what_the_caller_raises_ends_its_texts(model):
    """While the error is kept, and with it the frames of the call, as an interactive Python keeps it."""

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        model.generate(n=4, seed=0, steps=5000, on_step=stop)
    end = time.monotonic() + LONG
    while not idle(model):
        assert time.monotonic() < end
    assert kept.tb is not None


def test_a_prompt_without_room_for_text_is_refused_before_others_are_written(conditional):
    calls, long = conditional.stats().calls, " ".join(["w1"] * conditional.config.max_input_length)
    with pytest.raises(InputError, match="prompt 5 leaves no room for text"), pytest.warns(UserWarning):
        conditional.generate([*["w1"] * 4, long], length=conditional.config.max_input_length, steps=1)
    assert conditional.stats().calls == calls


def test_a_model_may_be_closed_by_a_callback(bundle):
    """In the driver's own thread, which closes engine and backend when it is done with them."""
    before, over = threading.enumerate(), threading.Event()
    model = elf_rt.load(bundle("cond"), "onnxruntime", threads=1)
    (driver,) = [each for each in threading.enumerate() if each.name == "elf-rt" and each not in before]
    pending, other = (model.submit(Text(seed=0, params=steps(model, count))) for count in (2, 5000))

    def end(_):
        model.close()
        over.set()

    pending.add_done_callback(end)
    assert over.wait(LONG) and len(pending.result(LONG).ids)
    with pytest.raises(BackendError, match="closed"):
        other.result(LONG)
    driver.join(LONG)
    assert not driver.is_alive()


def test_no_text_at_all_is_fine(model):
    assert model.write([]) == [] == model.run([])
    assert len(model.generate(n=1, seed=0, steps=1)) == 1


def test_few_steps_go_first_and_yet_all_advance():
    """Of three calls, two are for texts that are nearly done: here texts of one step, which come one after another."""
    gate = Gate()
    driver = stub_driver(gate, max_rows=1)
    long = pend(driver, program(20))
    gate.reached()
    short = [pend(driver, program(1, seed=1 + k)) for k in range(20)]
    gate.let(1 + 6)  # the call under way, and six more: two texts of two calls, and every third for the long one
    assert short[0].result(LONG).timings.calls == short[1].result(LONG).timings.calls == 2
    gate.let(1000)
    times = [pending.result(LONG).timings for pending in (long, *short)]
    assert times[0].waited_ms < times[1].waited_ms
    assert sum(other.total_ms < times[0].total_ms for other in times[1:]) == 20  # 40 calls beside 20 of 21
    driver.close()


def test_cancel_frees_the_slot_before_the_next_call():
    gate = Gate()
    driver = stub_driver(gate, max_rows=1)
    first = pend(driver, program(50))
    gate.reached()
    second = pend(driver, program(1, seed=1))
    assert first.cancel() and not first.done()
    gate.let(3)  # the call under way, and the two of the second text
    assert second.result(LONG)
    with pytest.raises(CancelledError):
        first.result(LONG)
    assert first.cancelled() and not first.cancel() and not second.cancel()
    assert len(gate.rows) == 3
    stats = driver.stats()
    assert (stats.slots, stats.waiting, stats.finished, stats.cancelled, stats.failed) == (0, 0, 1, 1, 0)
    driver.close()


def test_close_ends_everybody_with_one_error():
    gate = Gate()
    driver = stub_driver(gate)
    texts = [pend(driver, program(50, seed=k)) for k in range(200)]  # more than there are slots
    gate.reached()
    close_while_calls_run(driver, gate)
    for text in texts:
        with pytest.raises(BackendError, match="the model is closed"):
            text.result(LONG)
    with pytest.raises(BackendError, match="the model is closed"):
        pend(driver, program())
    driver.close()


def test_closing_a_model_while_threads_write(bundle):
    before = threading.active_count()
    opened = elf_rt.load(bundle("cond"), "onnxruntime", threads=1)
    told: list[BaseException] = []

    def write():
        try:
            opened.generate(n=8, seed=0, steps=500)
        except BaseException as error:
            told.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not opened.stats().calls:
        time.sleep(0.001)
    opened.close()
    for thread in threads:
        thread.join(LONG)
    assert [type(error) for error in told] == [BackendError] * 4
    assert all("the model is closed" in str(error) for error in told)
    assert threading.active_count() == before
    for use in (lambda: opened.submit(Text()), lambda: opened.stream(), lambda: opened.write([Text()]), opened.stats):
        with pytest.raises(BackendError, match="the model is closed"):
            use()


def test_a_failed_call_ends_its_texts_alone():
    def fail(rows):
        if rows == 3:
            raise RuntimeError("no luck\nat all")

    driver = stub_driver(fail, max_rows=8)
    guided = Table(np.array([0, 0, 1.0]), np.zeros((3, 5)), np.ones((3, 3)), (Row(True, True),) * 3)
    bad = pend(driver, Program(guided, 4, 0, 1.0))
    with pytest.raises(BackendError, match=r"the network call failed: RuntimeError: no luck$"):
        bad.result(LONG)
    assert pend(driver, program()).result(LONG)
    assert (driver.stats().failed, driver.stats().finished, driver.stats().slots) == (1, 1, 0)
    driver.close()


def test_latents_that_are_not_finite_end_that_text_alone():
    driver = stub_driver(max_rows=4)
    z0 = np.zeros((4, 3), np.float32)
    z0[1, 2] = np.inf
    good, bad = [pend(driver, program(5, seed=k)) for k in (1, 2)], pend(driver, program(5, z0=z0))
    with pytest.raises(BackendError, match="latents that are not finite"):
        bad.result(LONG)
    for k, each in zip((1, 2), good, strict=True):
        assert np.array_equal(each.result(LONG).ids, alone(program(5, seed=k)).ids)
    driver.close()


def test_not_finite_on_a_model(model):
    z0 = np.full((2, model.config.max_length, model.config.latent_dim), 0.5, np.float32)
    z0[1, 0, 0] = np.inf
    with pytest.raises(BackendError, match="latents that are not finite"):
        model.sample(z0=z0, params=steps(model, 2, sampler="ode"))
    assert np.isfinite(model.sample(z0=z0[:1], params=steps(model, 2, sampler="ode")).latents).all()


def test_given_noise_on_a_grid_of_each_text(model):
    """Where the step without noise is another one in each."""
    grid = np.array([[0, 0.5, 0.5, 1], [0, 0.3, 0.6, 1]])
    eps = np.random.default_rng(0).standard_normal((2, 2, model.config.max_length, model.config.latent_dim))
    params = steps(model, 3, sampler="sde")
    both = model.sample(grid=grid, eps=eps, seeds=[1, 2], params=params)
    for k in range(2):
        alone = model.sample(grid=grid[k], eps=eps[:, k : k + 1], seeds=[1 + k], params=params)
        np.testing.assert_allclose(both.latents[k], alone.latents[0], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a text", "a text must be an elf_rt.Text, got 'a text'"),
        (Text(prompt=5), "prompt must be a text, got 5"),
        (Text(seed=-1), r"seed must be a whole number between 0 and 2\*\*64 - 1, got -1"),
        (Text(seed=2**64), r"seed must be a whole number between 0 and 2\*\*64 - 1"),
        (Text(preset="best"), "preset must be one of default, got 'best'"),
        (Text(params={"steps": 3}), "params must be SamplingParams, as Model.params makes them"),
        (Text(length=0), "length must be a whole number between 1 and 24, got 0"),
        (Text(pinned={99: 1}), "a pinned position must be between 0 and 23, got 99"),
    ],
)
def test_an_impossible_text_is_named_and_disturbs_nobody(model, text, message):
    other = model.submit(Text(seed=1, params=steps(model, 20)))
    with pytest.raises(InputError, match=message):
        model.submit(text)
    with pytest.raises(InputError, match=message):
        model.write([Text(seed=2), text])
    assert np.array_equal(other.result(LONG).ids, model.generate(seed=1, steps=20)[0].ids)
    assert idle(model)


def test_a_table_of_ones_own(model):
    """The table that the parameters make gives what they give; one of the wrong shape is refused."""
    params = steps(model, 3)
    (grid,) = schedule.make_grid(params, model.config, np.array([4], np.uint64))
    table = schedule.make_table(params, model.config, grid, conditional=False)
    want = model.sample(seeds=[4], params=params)
    np.testing.assert_array_equal(model.sample(seeds=[4], table=table).latents, want.latents)
    for bad, message in (
        ({"t": table.t[:-1]}, r"coef of a table must have shape \(4, 5\), got \(5, 5\)"),
        ({"coef": table.coef[:, :4]}, r"coef of a table must have shape \(5, 5\), got \(5, 4\)"),
        ({"weights": np.full((5, 1), np.nan)}, "weights of a table must be finite"),
        ({"rows": (Row(False, True),)}, "the first guidance row of a table must see the source"),
        ({"rows": (Row(True, True),) * 5, "weights": np.ones((5, 5))}, "a table must have at most 4 guidance rows"),
        ({"rows": (schedule.DECODE,)}, "guidance rows, of which none decodes"),
    ):
        with pytest.raises(InputError, match=message):
            Table(**{"t": table.t, "coef": table.coef, "weights": table.weights, "rows": table.rows} | bad)
    with pytest.raises(InputError, match=r"table must be an elf_rt\.sampling\.schedule\.Table, got dict"):
        model.sample(seeds=[4], table={})
