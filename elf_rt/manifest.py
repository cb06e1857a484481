"""manifest.json: what it must hold, read and checked in one place. Fields that are not named here are ignored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from elf_rt.errors import BundleError, InputError
from elf_rt.fields import parse, read_json
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

    checkpoint: str
    sha256: str
    weights: str


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
    files: dict[str, str]
    vocab_size: int

    def __post_init__(self) -> None:
        if self.kind not in ENCODERS:
            raise InputError(f"kind must be one of {', '.join(ENCODERS)}, got {self.kind!r}")
        if not 1 <= self.vocab_size <= MOST_IDS:
            raise InputError(f"vocab_size must be between 1 and {MOST_IDS}, got {self.vocab_size}")


@dataclass(frozen=True)
class Item:
    """A layer that a precision plan keeps in another precision, or scales. reason: None where the plan gives none."""

    name: str
    precision: str
    reason: str | None


@dataclass(frozen=True)
class PrecisionPart:
    """The plan of one precision."""

    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    variants: precision -> the files that an engine reads, by role. precision: precision -> its plan.
    agreement: precision -> share of float32's tokens, where export measured it. left_out, unproven: precision -> what
    its proof found, of those that are not here and of those that are here all the same. files: name -> sha256.
    """

    model: ModelConfig
    presets: dict[str, SamplingParams]
    variants: dict[str, dict[str, str]]
    tokenizer: TokenizerPart
    encoder: EncoderPart | None
    source: Source
    precision: dict[str, PrecisionPart]
    agreement: dict[str, float]
    left_out: dict[str, str]
    unproven: dict[str, str]
    files: dict[str, str]

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_inside(name):
                raise InputError(f"files names a file outside the bundle, {name}")
        if "default" not in self.presets:
            raise InputError("presets.default is missing")
        for key, number in (("pad_id", self.tokenizer.pad_id), ("eos_id", self.tokenizer.eos_id)):
            if not 0 <= number < self.model.vocab_size:
                raise InputError(f"tokenizer.{key} must be an id of the model, got {number}")
        for precision, share in self.agreement.items():
            if not 0 <= share <= 1:
                raise InputError(f"agreement.{precision} must be between 0 and 1, got {share}")
        for precision, files in self.variants.items():
            self._check_files(f"variants.{precision}", files, GRAPHS)
        if self.tokenizer.file is not None:
            self._check_files("tokenizer", {"file": self.tokenizer.file})
        if self.encoder is not None:
            self._check_files("encoder.files", self.encoder.files, ENCODERS[self.encoder.kind])

    def _check_files(self, path: str, names: dict[str, str], roles: tuple[str, ...] = ()) -> None:
        """There may be more roles than those that must be there."""
        for role in (*roles, *names):
            if names.get(role) not in self.files:
                raise InputError(f"{path}.{role} must be a name that stands in files, got {names.get(role)!r}")

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
            return parse(cls, values)
        except InputError as error:
            raise BundleError(f"{path} is incomplete or altered: {error}: export the checkpoint again") from error


def _load(path: Path) -> dict[str, Any]:
    """The JSON object of a manifest of any schema."""
    if reason := why_not_here(path):
        raise BundleError(f"{path} {reason}")
    try:
        values = read_json(path)
    except InputError as error:
        raise BundleError(f"{path} is not JSON ({error}): export the checkpoint again") from error
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
