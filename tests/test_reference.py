"""The reference network against recorded outputs of the official code."""

import numpy as np
import pytest
import torch
from golden_cases import CASES, golden, relative_error

from elf_rt.export.reference import ELF


def reference(case: str) -> ELF:
    model = ELF(golden(case).config)
    model.load_state_dict(golden(case).state)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_denoise_call_equals_the_official_code(case: str) -> None:
    x, hidden = reference(case)(*golden(case).call("fwd"))
    assert relative_error(x, golden(case).arrays["fwd_x"]) < 5e-5
    assert hidden.shape == (*x.shape[:2], golden(case).config.hidden_size)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decode_call_equals_the_official_code(case: str) -> None:
    model = reference(case)
    x, hidden = model(*golden(case).call("dec"))
    logits = model.discretize_logits(hidden)
    assert relative_error(x, golden(case).arrays["dec_x"]) < 5e-5
    assert relative_error(logits, golden(case).arrays["dec_logits"]) < 5e-5
    assert np.array_equal(logits.argmax(-1), golden(case).arrays["dec_logits"].argmax(-1))


@torch.no_grad()
def test_mode_tokens_are_attended_in_denoise_mode() -> None:
    """Zero mode tokens still take a share of every softmax: dropping them changes the result."""
    model = reference("uncond")
    call = golden("uncond").call("fwd")
    with_tokens, _ = model(*call)
    prefix = model.prefix
    model.prefix = lambda t, s, mode: prefix(t, s, mode)[:, :-4]  # type: ignore[method-assign]
    without_tokens, _ = model(*call)
    assert relative_error(without_tokens, with_tokens) > 1e-3
