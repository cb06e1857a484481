"""From a checkpoint to a bundle, the whole way: read, measure, write the graphs, record the replay, prove it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elf_rt import __version__
from elf_rt.bundle import SUFFIX, Bundle, atomic_folder, write_manifest
from elf_rt.errors import CheckpointError, InputError, warn
from elf_rt.export.checkpoint import Checkpoint, load_checkpoint
from elf_rt.export.encoder import encoder_beside, find_tokenizer, write_encoder
from elf_rt.export.families import family_of
from elf_rt.export.foreign import printable, read_json
from elf_rt.export.graph import FUSED_OPSET
from elf_rt.export.precisions import PrecisionWriter, Proof
from elf_rt.export.presets import presets_for
from elf_rt.export.reference import ELF
from elf_rt.export.replay import Run, plan_runs, record
from elf_rt.export.sources import WEIGHT_SUFFIXES
from elf_rt.export.special_tokens import special_ids
from elf_rt.export.tokenizer import check_tokenizer, write_tokenizer
from elf_rt.manifest import TokenizerPart
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.text.codec import TextCodec

REPLAY_BATCH = 4
RANGE_POSITIONS = 1536  # activations are measured on so many, so that no single near tie decides
LEAST_TEXTS, MOST_TEXTS = 8, 32  # texts that these positions are in; large models have fewer
REPLAY_STEPS = 8  # more would amplify float32 rounding on an untrained model until nothing can be judged
RANGE_STEPS = 16  # activations are measured on longer runs, with seeds of their own


@dataclass(frozen=True)
class ExportOptions:
    """What ``elf-rt export`` may be told.

    config: the YAML, where it is not beside the weights. raw: the weights without moving average.
    tokenizer, encoder: files, folders or Hub ids; looked for beside the checkpoint by default.
    append_eos: whether source texts end with EOS; None: yes, but for models on GPT-2, which are trained without.
    opset: of ONNX; 20 for engines older than its operators Attention and RMSNormalization, such as TensorRT 10.3.
    precisions: to be tried; float32 is always written. required: of these, what must be proven; others are left out
    where they are not. keep_unproven: required ones stay even then, and are marked.
    verbose: tell also which fields of the config are ignored.
    prompts: texts to record the replay and measure activations with, for conditional models.
    presets: named sampling parameters that replace the official ones.
    """

    config: Path | None = None
    raw: bool = False
    tokenizer: Path | None = None
    encoder: str | None = None
    append_eos: bool | None = None
    precisions: Sequence[str] = ("fp32", "fp16")
    required: Sequence[str] = ()
    keep_unproven: bool = False
    verbose: bool = False
    opset: int = FUSED_OPSET
    prompts: Sequence[str] = ()
    presets: dict[str, SamplingParams] = field(default_factory=dict)


def range_texts(config: ModelConfig) -> int:
    """How many texts activations are measured on."""
    return max(LEAST_TEXTS, min(MOST_TEXTS, RANGE_POSITIONS // config.max_length))


def default_output(source: str) -> Path:
    """The bundle's folder, named after the checkpoint, in the current folder."""
    path = Path(source)
    name = path.stem if path.suffix in WEIGHT_SUFFIXES else path.name
    return Path(f"{name or path.resolve().name}{SUFFIX}")


def export_bundle(
    source: str,
    output: Path,
    options: ExportOptions,
    *,
    prove: Callable[[Path, str], Proof],
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Write the bundle of a checkpoint; returns what there is to know of it, a line each.

    Args:
        prove: replays one precision of a folder.
        say: told what is being done.

    Raises:
        CheckpointError: the checkpoint, its config, tokenizer or encoder cannot be used.
        InputError: float32 or a required precision is not proven; then nothing is written.
    """
    say("reading the checkpoint")
    checkpoint = load_checkpoint(source, config=options.config, raw=options.raw)
    model = ELF(checkpoint.config)
    model.load_state_dict(checkpoint.state)
    model.eval()
    with atomic_folder(output) as folder:
        presets = presets_for(checkpoint.config, family_of(checkpoint.settings.values)) | options.presets
        manifest = _describe(checkpoint, presets)
        manifest |= _write_text_side(folder, checkpoint, options)
        write_manifest(folder, manifest | {"variants": {}})  # enough for the text side
        codec = TextCodec(Bundle.open(folder))
        cond, mask = _sources(codec, manifest, options)

        say("running the reference model")
        runs = plan_runs(checkpoint.config, presets, cond, mask, max_steps=REPLAY_STEPS, batch=REPLAY_BATCH, seed=0)
        np.savez(folder / "replay.npz", **_with_texts(record(model, runs), codec))  # type: ignore[arg-type]

        range_batch = range_texts(checkpoint.config)

        def longer_runs(max_steps: int) -> list[Run]:
            return plan_runs(checkpoint.config, presets, cond, mask, max_steps=max_steps, batch=range_batch, seed=1)

        writer = PrecisionWriter(
            folder,
            manifest,
            checkpoint,
            model,
            opset=options.opset,
            measured=longer_runs(RANGE_STEPS),
            calibrated=lambda: longer_runs(REPLAY_STEPS),
            special=TokenizerPart(codec.pad_id, codec.eos_id),
            prove=prove,
            required=options.required,
            keep_unproven=options.keep_unproven,
            say=say,
        )
        writer.write(options.precisions)
    ignored = (
        [f"ignored in the config: {', '.join(checkpoint.ignored)}"] if options.verbose and checkpoint.ignored else []
    )
    return [f"read: {checkpoint.summary}", *ignored, *writer.notes]


def _describe(checkpoint: Checkpoint, presets: dict[str, SamplingParams]) -> dict[str, Any]:
    return {
        "exporter": f"elf-rt {__version__}",
        "source": {
            "checkpoint": printable(checkpoint.path.name),
            "sha256": checkpoint.sha256,
            "weights": checkpoint.weights,
            "layout": checkpoint.layout,
            "step": checkpoint.step,
        },
        "model": checkpoint.config,
        "presets": presets,
        "encoder": None,
    }


def _write_text_side(folder: Path, checkpoint: Checkpoint, options: ExportOptions) -> dict[str, Any]:
    """Tokenizer and encoder into the folder; their manifest entries."""
    entries: dict[str, Any] = {}
    config = checkpoint.config
    encoder = options.encoder or encoder_beside(checkpoint.folder, checkpoint.settings)
    # An unconditional model needs an encoder for pinned spans alone, so only when it is asked for.
    needs_encoder = config.max_input_length > 0 or options.encoder is not None
    tokenizer, known = options.tokenizer, None
    if tokenizer is None:
        try:
            tokenizer = find_tokenizer(checkpoint.folder, encoder, alone=not needs_encoder)
        except CheckpointError as error:
            if needs_encoder:
                raise
            warn(f"no tokenizer: {error}")
    if tokenizer is not None:
        known = check_tokenizer(tokenizer, config.vocab_size)
        write_tokenizer(tokenizer, folder / "tokenizer.json")
    entries["tokenizer"] = special_ids(checkpoint.settings, known) | _eos_rules(checkpoint, options)
    if known is not None:
        entries["tokenizer"]["file"] = "tokenizer.json"
    if encoder is not None and needs_encoder:
        tokens = known.size if known else 0
        entries["encoder"] = write_encoder(
            folder,
            encoder,
            latent_dim=config.latent_dim,
            vocab_size=tokens,
            max_length=config.max_input_length,
            statistics=checkpoint.statistics,
        )
    return entries


def _eos_rules(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, bool]:
    """Whether EOS follows a source, and whether it ends a text. GPT-2's stands before each document as well, so ELF-MMD
    trains without it in sources, and does not cut texts of OpenWebText, which may begin with it."""
    gpt2 = checkpoint.settings.get("encoder_family") == "gpt2"
    appends = not gpt2 if options.append_eos is None else options.append_eos
    return {"append_eos": appends, "ends_at_eos": not gpt2 or checkpoint.config.max_input_length > 0}


def _sources(
    codec: TextCodec, manifest: dict[str, Any], options: ExportOptions
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Source latents (B, L, C) and masks (B, L): of the given prompts, else of random tokens, MOST_TEXTS at most."""
    if manifest["encoder"] is None:
        if options.prompts:
            raise CheckpointError("prompts have no use here: this model takes none, or has no text encoder")
        return None, None
    config = codec.config
    if options.prompts:
        sources = codec.tokenize(options.prompts[:MOST_TEXTS])
    else:
        rng = np.random.default_rng(0)
        tokens = np.arange(min(config.vocab_size, manifest["encoder"]["vocab_size"]))
        tokens = np.setdiff1d(tokens, [codec.pad_id, codec.eos_id])
        widths = np.linspace(config.max_input_length, 1, REPLAY_BATCH).round().astype(int)  # long and short
        widths = np.resize(widths, MOST_TEXTS)
        sources = [tokens[rng.integers(0, len(tokens), width)].tolist() for width in widths]
    latents, mask = codec.encode(sources, config.max_length)
    return torch.from_numpy(latents), torch.from_numpy(mask)


def _with_texts(arrays: dict[str, np.ndarray], codec: TextCodec) -> dict[str, np.ndarray]:
    """The arrays of replay.npz with what a reader sees: the final ids of each run, and their texts."""
    for name in [name for name in arrays if name.endswith("_ids") and name.startswith("run")]:
        run = name.removesuffix("_ids")
        mask = arrays.get(f"{run}_cond_mask")
        final = codec.finish(arrays[name], None if mask is None else mask.sum(1).astype(int))
        arrays[f"{run}_final_ids"] = final
        if codec.tokenizer is not None:
            arrays[f"{run}_text"] = np.array([codec.decode(row) for row in final])
    return arrays


def read_presets(path: Path) -> dict[str, SamplingParams]:
    """Named presets from a JSON file: {"name": {"steps": 8, ...}}."""
    presets = read_json(path)
    if not all(isinstance(values, dict) for values in presets.values()):
        raise CheckpointError(f'{path} must hold presets by name, such as {{"fast": {{"steps": 8}}}}')
    made = {}
    for name, values in presets.items():
        try:
            made[name] = SamplingParams().replace(**values)
        except (InputError, TypeError) as error:
            raise CheckpointError(f"preset {name!r} in {path}: {error}") from error
    return made
