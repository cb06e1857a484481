"""Shapes that a plan takes, and the device memory that they need. Letters: R network rows, L length."""

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig
from elf_rt.plans import Profile, Range


def parse_range(text: str, option: str) -> Range:
    """ "8" or "1:8:32" (least, best, most)."""
    parts = text.strip().split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"{option} must be a number such as 8, or least:best:most such as 1:8:32, got {text!r}")
    sizes = [int(part) for part in parts]
    try:
        return Range(sizes[0], sizes[len(sizes) // 2], sizes[-1])
    except InputError as error:
        raise InputError(f"{option} {error}") from error


def parse_profiles(batch: str, length: str | None, config: ModelConfig) -> tuple[Profile, ...]:
    """One profile for each comma-separated item of ``batch``; ``length`` is the trained one when None."""
    lengths = parse_range(length or str(config.max_length), "--length")
    if lengths.most > config.max_length:
        raise InputError(f"--length must be at most {config.max_length}, the model's own, got {lengths.most}")
    profiles = [Profile(parse_range(item, "--batch"), lengths) for item in batch.split(",")]
    return tuple(dict.fromkeys(profiles))


def input_shape(shape: tuple[int, ...], rows: int, length: int) -> tuple[int, ...]:
    """A graph input's shape with its two dynamic axes (-1) filled: rows first, length second."""
    return tuple((rows, length)[axis] if size == -1 else size for axis, size in enumerate(shape))


def buffer_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Device memory of all inputs and outputs of both graphs for one shape, in bytes."""
    latents = 3 if config.self_cond else 2  # z, x and, with self-conditioning, x_prev
    per_position = 4 * (latents * config.latent_dim + config.hidden_size) + 8  # float32 latents and hidden, int64 ids
    return rows * (length * per_position + 4 * 3)  # t, s and mode
