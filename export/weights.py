"""Which tensors of a checkpoint are an ELF, and what they are: the moving average ("ema"), the trained ones ("raw") or,
where the file does not tell, "unknown".

A set of weights is found by its names, wherever it lies: under `state_dict`, behind `model.`, inside `ema.shadow`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import printable
from elf_rt.export.stored import Stored, flatten_lists

# What training wrappers put into names, at any depth: DDP, torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_ROOTS = {  # first parts of an ELF's names
    *("self_cond_proj", "text_proj", "t_embedder", "t_emb_tokens", "self_cond_cfg_embedder", "self_cond_cfg_tokens"),
    *("mode_tokens", "blocks", "final_layer", "decoder_head_norm", "proj_kernel", "proj_bias"),
    *("unembed_kernel", "unembed_bias"),
}
_ONLY_ELF = {"unembed_kernel", "unembed_bias", "proj_kernel", "proj_bias", "t_emb_tokens", "text_proj"}
_NO_AVERAGE = re.compile(r"^(online|current)|(^|[^a-z])(non?|not|without|before)([^a-z]|$)", re.IGNORECASE)  # `non_ema`
_AVERAGE = re.compile(r"(^|[^a-z])(ema|average[ds]?|averaging|avg|swa|shadow|polyak)([^a-z]|$)", re.IGNORECASE)
_TRAINING = re.compile(
    r"(^|[._])(opt|opt_states?|optim\w*|grads?|grad_\w+|exp_avg\w*|mu|nu|momentum|velocity)([._]|$)", re.IGNORECASE
)
_MOMENTS = re.compile(r"\w*(exp|square|grad)_avg\w*")  # averages of gradients, which optimizers keep
_UNUSED = re.compile(  # tensors that training keeps beside the network and inference never reads
    r"(.*\.)?(\w*rope|rotary\w*|inv_freq|freqs\w*|position_ids|n_averaged|num_updates|decay|num_batches_tracked)(\..*)?"
    r"|(\w+_)?(encoder|teacher|discriminator|critic|losses|loss|metrics?|projector|heads?)\..*|(aux|repa)\w*\..*"
    r"|(global_)?steps?|epoch|iteration|\w*rng\w*"
)
OFFICIAL_AVERAGE = "ema_params1"  # the official evaluation uses this one


@dataclass(frozen=True)
class WeightSet:
    """One ELF of a checkpoint. where: the prefix of its names. names: of its tensors, with their paths in the file."""

    kind: str  # "ema" | "raw" | "unknown"
    where: str
    names: Mapping[str, str]


def is_unused(name: str) -> bool:
    """Whether a tensor beside an ELF's own is of a kind that inference does not need."""
    return _UNUSED.fullmatch(name) is not None


def choose(stored: Stored, raw: bool, path: object) -> WeightSet:
    """The set to export: the average where there is one; with `raw` the trained weights.

    Raises:
        CheckpointError: there is no ELF, no such set, or several that could be meant.
    """
    sets = find_sets(stored)
    if not sets:
        held = ", ".join(map(printable, list(stored.top or stored.leaves)[:8])) or "nothing"
        raise CheckpointError(f"{path} holds no weights of an ELF, only: {held}")
    wanted = [found for found in sets if found.kind == ("raw" if raw else "ema")]
    wanted = [found for found in wanted if found.where == OFFICIAL_AVERAGE] or wanted
    if not wanted and len(sets) == 1 and sets[0].kind == "unknown":
        wanted = sets  # the only one: whatever it is, it is meant
    if len(wanted) == 1:
        return wanted[0]
    if not wanted and sets[0].kind == "ema":
        raise CheckpointError(f"{path} holds only averaged weights (EMA): leave out --raw")
    if not wanted and sets[0].kind == "raw":
        other = _other_average(stored, [found.names for found in sets])
        listed = f" (those under {printable(other)} are not all there, or a list without names)" if other else ""
        raise CheckpointError(f"{path} holds no EMA weights{listed}: pass --raw to take the others")
    places = ", ".join(printable(found.where or "the top level") for found in wanted or sets)
    raise CheckpointError(f"{path} holds several sets of weights ({places}): save the state dict that you mean alone")


def find_sets(stored: Stored) -> list[WeightSet]:
    """Every ELF in the checkpoint, with what the file proves of it."""
    groups = _grouped(stored.leaves)
    averaged = {where for where in groups if _is_average(where, stored)}
    trained = [where for where in groups if where not in averaged]
    proven = len(trained) == 1 and (averaged or trained == ["params"] or _other_average(stored, groups.values()))
    kinds = dict.fromkeys(trained, "raw" if proven else "unknown") | dict.fromkeys(averaged, "ema")
    return [WeightSet(kinds[where], where, names) for where, names in groups.items()]


def named_average(name: str) -> bool:
    """Whether a name says that it is of averaged weights."""
    return _AVERAGE.search(name) is not None and _NO_AVERAGE.search(name) is None


def _is_average(where: str, stored: Stored) -> bool:
    for part in reversed(where.split(".")):  # the innermost that tells: `ema.online_model` is not the average
        if _NO_AVERAGE.search(part):
            return False
        if _AVERAGE.search(part):
            return True
    if {"averaging_state", "current_model_state"} <= stored.top.keys():  # Lightning's WeightAveraging moves them about
        return where.startswith("state_dict")
    parts = where.split(".")  # torch.optim.swa_utils.AveragedModel counts beside the module that it wraps
    return any(".".join([*parts[:at], "n_averaged"]) in stored.leaves for at in range(len(parts) + 1))


def _other_average(stored: Stored, sets: Iterable[Mapping[str, str]]) -> str | None:
    """Where an average is kept that is no set of weights: in the order of the parameters, as torch_ema, diffusers and
    NeMo do, in the state of the optimizer, or of some layers alone. sets: the names of those that were found."""
    if not stored.top:
        return None
    read = {path for names in sets for path in names.values()}
    shapes = {stored.leaves[path].shape for path in read if torch.is_tensor(stored.leaves[path])}
    for path in (path for path in stored.leaves if path not in read):
        for inner, value in flatten_lists(path, stored.leaves[path]):
            of_weights = torch.is_tensor(value) and value.ndim >= 2 and value.shape in shapes
            if of_weights and named_average(_MOMENTS.sub("", inner)):
                return path
    return None


def _grouped(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of tensors by the prefix before them, wherever at least one name is there that only an ELF has."""
    split = {path: [part for part in path.split(".") if part not in _WRAPPERS] for path in paths}
    groups: dict[str, dict[str, str]] = {}
    for parts in split.values():
        at = next((i for i, part in enumerate(parts) if part in _ROOTS), len(parts))
        where = ".".join(parts[:at])
        if at < len(parts) and parts[at] in _ONLY_ELF and not _TRAINING.search(where):
            groups[where] = {}
    for path, parts in split.items():
        for at in range(len(parts) - 1, -1, -1):  # the longest prefix counts
            if (where := ".".join(parts[:at])) in groups:
                groups[where][".".join(parts[at:])] = path
                break
    undotted = {name.replace(".", ""): name for names in groups.values() for name in names if "." in name}
    return {where: _members({undotted.get(n, n): p for n, p in names.items()}) for where, names in groups.items()}


def _members(names: dict[str, str]) -> dict[str, str]:
    """The ELF's own names, and those that lie right beside them in the file."""
    own = {name: path for name, path in names.items() if name.split(".")[0] in _ROOTS}
    beside = tuple({path.removesuffix(name) for name, path in own.items() if path.endswith(name)})
    return {name: path for name, path in names.items() if name in own or path.startswith(beside)}
