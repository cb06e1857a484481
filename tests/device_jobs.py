"""Bundles and jobs for the tests of the device sampler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from plan_bundles import golden_bundle

from elf_rt.bundle import Bundle
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling.engine import Job, Outcome
from elf_rt.sampling.schedule import make_grid, make_table

SOURCE_LENGTHS = (3, 1, 5, 2)


def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """By golden case, each made once."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle(case: str) -> Bundle:
        if case not in made:
            made[case] = golden_bundle(folder / f"{case}.elfrt", case, ("fp32",))
        return made[case]

    return bundle


def make_job(
    config: ModelConfig, seeds: list[int], *, drafts_every: int = 0, source_seed: int | None = None, **params: Any
) -> Job:
    """A job of the public API, without text: sources are random latents of different lengths."""
    sampling, all_seeds = SamplingParams(**{"steps": 6} | params), np.array(seeds, np.uint64)
    source = mask = None
    if config.max_input_length:
        shape = (len(seeds), config.max_length, config.latent_dim)
        source = np.random.default_rng(source_seed or 0).standard_normal(shape).astype(np.float32)
        mask = np.arange(config.max_length) < np.resize(SOURCE_LENGTHS, len(seeds))[:, None]
    table = make_table(sampling, config, make_grid(sampling, config, all_seeds), conditional=source is not None)
    every = {"drafts_every": drafts_every, "latents": True}
    return Job(table, config.max_length, all_seeds, sampling.sc_cfg, source, mask, **every)


def outcome_of(events: Any) -> Outcome:
    *_, last = events
    assert isinstance(last, Outcome)
    return last


def assert_same(device: Outcome, host: Outcome) -> None:
    np.testing.assert_array_equal(device.latents, host.latents)
    np.testing.assert_array_equal(device.ids, host.ids)
    assert device.calls == host.calls
