"""manifest.json: what it must hold, read and checked in one place. Fields that are not named here are ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from elf_rt.errors import BundleError
from elf_rt.fields import Field, Wrong, read_json
from elf_rt.files import is_inside, why_not_here
from elf_rt.params import ModelConfig, SamplingParams

FORMAT = "elf-rt-bundle"
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
MOST_IDS = 1 << 24
ENCODERS = {"embedding": ("table",), "onnx": ("encoder", "weights")}  # kind -> its files
GRAPHS = ("denoiser", "discretizer", "weights")  # the files that every variant has


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle was made from. weights: "ema", "raw" or "unknown". sha256: "" without a file."""

    checkpoint: str = ""
    sha256: str = ""
    weights: str = "unknown"


@dataclass(frozen=True)
class TokenizerPart:
    """append_eos: whether source texts end with EOS, as in training. ends_at_eos: whether it ends a text.
    file: None for a bundle that gives ids only."""

    pad_id: int = 0
    eos_id: int = 1
    append_eos: bool = True
    ends_at_eos: bool = True
    file: str | None = None


@dataclass(frozen=True)
class EncoderPart:
    """kind: of ENCODERS. files: every file that it needs, by role. vocab_size: ids that it knows."""

    kind: str
    files: Mapping[str, str]
    vocab_size: int


@dataclass(frozen=True)
class Item:
    """A layer that a precision plan keeps in another precision, or scales. reason: "" where the plan gives none."""

    name: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    variants: precision -> the files that an engine reads, by role. precision: precision -> the items of its plan.
    agreement: precision -> share of float32's tokens, where export measured it. left_out, unproven: precision -> what
    its proof found, of those that are not here and of those that are here all the same. files: name -> sha256.
    json: the manifest as it was read.
    """

    config: ModelConfig
    presets: dict[str, SamplingParams]
    variants: dict[str, dict[str, str]]
    tokenizer: TokenizerPart
    encoder: EncoderPart | None
    source: Source
    precision: dict[str, tuple[Item, ...]]
    agreement: dict[str, float]
    left_out: dict[str, str]
    unproven: dict[str, str]
    files: dict[str, str]
    json: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises BundleError: it is not JSON, of another schema, or a field is missing or of another type."""
        values = _load(path)
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path.parent} has bundle schema {version!r}, this elf-rt reads {SCHEMA_VERSION}: "
                "update elf-rt, or export the checkpoint again"
            )
        try:
            return cls._parse(Field("", values))
        except Wrong as wrong:
            raise BundleError(f"{path} is incomplete or altered: {wrong}: export the checkpoint again") from wrong

    @classmethod
    def _parse(cls, root: Field) -> Self:
        files = {name: entry.text() for name, entry in root.get("files").items()}
        for name in files:
            if not is_inside(name):
                raise Wrong(f"files names a file outside the bundle, {name}")
        config = root.get("model").build(ModelConfig)
        presets = {name: entry.build(SamplingParams) for name, entry in root.get("presets").items()}
        if "default" not in presets:
            raise Wrong("presets.default is missing")
        return cls(
            config=config,
            presets=presets,
            variants={name: entry.files(GRAPHS, files) for name, entry in root.get("variants").items()},
            tokenizer=_tokenizer(root.get("tokenizer"), config.vocab_size, files),
            encoder=None if root.get("encoder").value is None else _encoder(root.get("encoder"), files),
            source=Source(*(root.get("source").get(key).text() for key in ("checkpoint", "sha256", "weights"))),
            precision={name: _items(plan.get("items")) for name, plan in root.get("precision").items()},
            agreement={name: share.number(0, 1) for name, share in root.get("agreement").items()},
            left_out={name: reason.text() for name, reason in root.get("left_out").items()},
            unproven={name: reason.text() for name, reason in root.get("unproven").items()},
            files=files,
            json=root.object(),
        )


def _load(path: Path) -> dict[str, Any]:
    """The JSON object of a manifest of any schema."""
    if reason := why_not_here(path):
        raise BundleError(f"{path} {reason}")
    try:
        values = read_json(path)
    except Wrong as wrong:
        raise BundleError(f"{path} is not JSON ({wrong}): export the checkpoint again") from wrong
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of an elf-rt bundle")
    return values


def listed_files(path: Path) -> list[str]:
    """The files that a manifest of any schema names, as far as they are below its folder.

    Raises:
        BundleError: it is not the manifest of a bundle, or damaged.
    """
    files = _load(path).get("files")
    return [name for name in files if is_inside(name)] if isinstance(files, dict) else []


def _tokenizer(entry: Field, vocab_size: int, files: Mapping[str, str]) -> TokenizerPart:
    pad_id, eos_id = (entry.get(key).whole(0, vocab_size - 1) for key in ("pad_id", "eos_id"))
    file = entry.get("file").file(files) if "file" in entry.object() else None
    append_eos, ends_at_eos = (entry.get(key).flag() for key in ("append_eos", "ends_at_eos"))
    return TokenizerPart(pad_id, eos_id, append_eos, ends_at_eos, file)


def _encoder(entry: Field, files: Mapping[str, str]) -> EncoderPart:
    kind = entry.get("kind").one_of(ENCODERS)
    return EncoderPart(
        kind, entry.get("files").files(ENCODERS[kind], files), entry.get("vocab_size").whole(1, MOST_IDS)
    )


def _items(plan: Field) -> tuple[Item, ...]:
    return tuple(
        Item(
            entry.get("name").text(),
            entry.get("precision").text(),
            entry.get("reason").text() if "reason" in entry.object() else "",
        )
        for entry in plan.list()
    )
