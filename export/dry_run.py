"""What an export would find and write, without writing it."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from elf_rt.export.checkpoint import Checkpoint, load_checkpoint
from elf_rt.export.encoder import encoder_beside
from elf_rt.export.families import family_of
from elf_rt.export.pipeline import RANGE_STEPS, ExportOptions, range_texts
from elf_rt.export.presets import presets_for
from elf_rt.export.reference import ELF
from elf_rt.params import SamplingParams

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.3, "int8-openvino": 1.3}  # bytes of a weight, roughly
PASSES = {"fp32": 3, "fp16": 1, "bf16": 6, "int8": 2, "int8-openvino": 3}  # how often the runs are sampled, roughly


def describe_export(source: str, output: Path, options: ExportOptions) -> list[tuple[str, str]]:
    """Lines of name and text.

    Raises:
        CheckpointError: as the export would, as far as the checkpoint and its config go.
    """
    found = load_checkpoint(source, config=options.config, raw=options.raw)
    c = found.config
    weights = sum(tensor.numel() for tensor in found.state.values())
    kind = f"sources of up to {c.max_input_length} tokens" if c.max_input_length else "unconditional"
    presets = presets_for(c, family_of(found.settings.values)) | options.presets
    size = sum(BYTES[name] * weights for name in options.precisions)
    blocks = f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads of {c.head_dim}"
    return [
        ("checkpoint", f"{found.path}: {found.summary}"),
        ("model", f"{blocks}, {weights / 1e6:.1f} M weights"),
        ("", f"{c.max_length} tokens, {kind}, latents of {c.latent_dim}, vocabulary {c.vocab_size}"),
        (
            "config",
            str(found.settings_from or ("in the checkpoint" if found.settings.values else "none: a released model's")),
        ),
        ("encoder", _encoder(found, options)),
        ("tokenizer", _tokenizer(found, options)),
        ("presets", ", ".join(presets)),
        ("would write", f"{output}: {', '.join(options.precisions)}, about {size / 1e6:.0f} MB without the encoder"),
        ("time", f"about {_seconds(found, options, presets):.0f} s on this machine, without the encoder"),
    ]


def _encoder(found: Checkpoint, options: ExportOptions) -> str:
    if not found.config.max_input_length and options.encoder is None:
        return "none: the model takes no source"
    named = options.encoder or encoder_beside(found.folder, found.settings)
    if named is None:
        return "none found: name one with --encoder, else the bundle takes no prompts"
    return named if Path(named).exists() else f"{named}, from the Hub"


def _tokenizer(found: Checkpoint, options: ExportOptions) -> str:
    path = options.tokenizer or found.folder / "tokenizer.json"
    if path.is_file():
        return str(path)
    named = options.encoder or encoder_beside(found.folder, found.settings)
    return f"that of {named}" if named else "none found: name one with --tokenizer, else the bundle gives ids only"


def _seconds(found: Checkpoint, options: ExportOptions, presets: Mapping[str, SamplingParams]) -> float:
    """From one network call of one row: nearly all of an export's time goes into calls of the reference and replays."""
    model = ELF(found.config).eval()
    model.load_state_dict(found.state)
    z = torch.zeros(1, found.config.max_length, found.config.latent_dim)
    one = torch.ones(1)
    calls = []
    for _ in range(3):  # the first one is slow
        start = time.perf_counter()
        with torch.no_grad():
            model(z, z, one, one, one)
        calls.append(time.perf_counter() - start)
    rows = sum(2 if params.guidance_scale != 1 else 1 for params in presets.values())
    steps = min(RANGE_STEPS, max(params.steps for params in presets.values()))
    return min(calls) * rows * steps * range_texts(found.config) * sum(PASSES[name] for name in options.precisions)
