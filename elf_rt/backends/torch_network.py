"""The network in torch, with the weights of a bundle's graphs, for the torch backend.

The graphs hold every decision of the precision plan: a weight's type is that of its product, `.scale` tensors undo the
powers of two that were folded in, widths are padded, rotary is half-split. So this follows them and decides nothing.
The residual stream, all statistics and what stands between two products are float32.

The blocks run in one of two ways, which ``torch_tuning`` chooses between for each shape: torch's products with what
stands between them fused by torch.compile, or the kernels of ``torch_kernels``.

Letters: R rows, L text length, P prefix tokens, S = P + L, C latents, H hidden, D head width (padded), V vocabulary.
"""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from elf_rt.backends import torch_attention
from elf_rt.backends.torch_attention import Attention
from elf_rt.backends.torch_pointwise import EAGER, Branch, norm
from elf_rt.backends.torch_weights import Block, GraphWeights, Linear, make_block, whole_unembedding
from elf_rt.bundle import Bundle
from elf_rt.manifest import PrecisionPart

if TYPE_CHECKING:
    from elf_rt.backends.torch_fused import FusedBlocks
    from elf_rt.backends.torch_kernels import Tile

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOGITS_AT_ONCE = 4096 * 32100  # logits in memory at the same time: 0.5 GB
# The ids are padded to a multiple of this, because the product is three times as fast as with an odd number of them.
VOCABULARY = 128


@dataclass(frozen=True)
class Choice:
    """How the blocks run for one shape. tiles: of the four products of a block ("qkv", "proj", "w12", "w3") by the
    kernels of ``torch_kernels``, or None for torch's products."""

    attention: Attention = torch_attention.TORCH
    tiles: "dict[str, Tile] | None" = None


class Network:
    """The denoiser and the discretizer. Exchange `pointwise` for ``torch_pointwise.compiled()`` to make it faster.

    choices: by (R, L); `first` for shapes that nothing was chosen for.
    """

    def __init__(self, bundle: Bundle, precision: str, device: str) -> None:
        self.config = config = bundle.config
        self.pointwise = EAGER
        self.fused: FusedBlocks | None = None
        self.first = Choice()
        self.choices: dict[tuple[int, int], Choice] = {}
        weights = GraphWeights(bundle, precision, device)
        plan = bundle.manifest.precision.get(precision, PrecisionPart())
        exceptions = {item.name: item.precision for item in plan.items}
        self.eps = weights.eps("final_layer.norm_final")
        self._prefix = Prefix(weights)
        self._proj1, self._proj2 = weights.linear("text_proj.proj1"), weights.linear("text_proj.proj2")
        self.cos, self.sin = weights.tensor("rotary.cos"), weights.tensor("rotary.sin")
        types = [PRECISIONS[exceptions.get(f"blocks.{i}.attn", precision)] for i in range(config.depth)]
        self.blocks = [make_block(weights, f"blocks.{i}", self.cos, self.sin, t) for i, t in enumerate(types)]
        self._norm_final = weights.tensor("final_layer.norm_final.weight")
        self._final = weights.linear("final_layer.linear")
        self._head_norm = weights.tensor("decoder_head_norm.weight") if config.decoder_head_norm else None
        self._head, self._unembed = weights.linear("proj"), padded(whole_unembedding(weights))

    def denoise(
        self,
        z: Tensor,
        x_prev: Tensor | None,
        t: Tensor,
        s: Tensor | None,
        mode: Tensor | None,
        x: Tensor,
        hidden: Tensor,
        choice: Choice | None = None,
    ) -> None:
        """z, x_prev (R, L, C), t, s, mode (R,) float32: writes x (R, L, C) and hidden (R, L, H) float32.

        choice: another than that of `choices`.
        """
        do, choice = self.pointwise, choice or self.choices.get((z.shape[0], z.shape[1]), self.first)
        text = do.finished(*self._proj1.unfinished(do.text_input(z, x_prev, self._proj1.type)), self._proj2.type)
        h = do.residual(*self._prefix.unfinished(do, t, s, mode), *self._proj2.unfinished(text))
        if choice.tiles is None:
            branch = self._plain(h, choice.attention)
        else:
            assert self.fused is not None
            branch = self.fused.run(h, do, choice.attention, choice.tiles)
        normed = do.final_norm(*branch, self._norm_final, self.eps, self._final.type, hidden)
        do.write_finished(*self._final.unfinished(normed), x)

    def discretize(self, hidden: Tensor) -> Tensor:
        """hidden (R, L, H) -> ids (R, L): the lowest of the ids with the largest logit."""
        parts = []
        for tokens in hidden.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // self.config.vocab_size)):
            if self._head_norm is not None:
                tokens = norm(tokens, self._head_norm, self.eps, self._head.type)
            features = F.gelu(self._head(tokens), approximate=self.config.head_gelu)  # (tokens, C)
            parts.append(self.pointwise.likeliest(*self._unembed.unfinished(features)))  # of (tokens, V) logits
        return torch.cat(parts).view(hidden.shape[:2])

    def _plain(self, h: Tensor, attention: Attention) -> Branch:
        """h (R, S, H) float32 -> h with all branches but the last added, and that one."""
        do, first = self.pointwise, self.blocks[0]
        normed = do.norm(h, first.norm1, self.eps, first.qkv.type)
        for block, after in itertools.pairwise(self.blocks):
            branch = self._branches(block, h, normed, attention)
            h, normed = do.added_norm(*branch, after.norm1, self.eps, after.qkv.type)
        return self._branches(self.blocks[-1], h, normed, attention)

    def _branches(self, block: Block, h: Tensor, x: Tensor, attention: Attention) -> Branch:
        """The residual h (R, S, H) float32 and its norm x -> h with attention added, and the MLP's unfinished product,
        which what comes next adds to it."""
        (rows, size, _), do = h.shape, self.pointwise
        qkv = block.qkv.product(x)  # (R, S, 3 heads D)
        qk = do.rotated_heads(qkv, block.head_bias, block.cos[:size], block.sin[:size], block.eps, block.attention_type)
        v = qkv.view(rows, size, 3, *qk.shape[3:])[:, :, 2].to(block.attention_type)  # (R, S, heads, D)
        if v.dtype is torch.float32:  # the attention libraries take 16 bits only
            attention = torch_attention.TORCH
        mixed = attention.run(qk[:, :, 0], qk[:, :, 1], v, self.config.head_dim**-0.5)  # (R, S, heads D)
        h, x = do.added_norm(h, *block.proj.unfinished(mixed), block.norm2, self.eps, block.w12.type)
        gated = do.gate(*block.w12.unfinished(x), block.w3.type)  # (R, S, inner)
        return h, *block.w3.unfinished(gated)


class Prefix:
    """The tokens before the text: time, self-conditioning scale, mode. The two embedders are one product each."""

    def __init__(self, weights: GraphWeights) -> None:
        self._frequencies = weights.tensor("frequencies")
        named = [("t_embedder", "t_emb_tokens"), ("self_cond_cfg_embedder", "self_cond_cfg_tokens")]
        named = [(embedder, tokens) for embedder, tokens in named if tokens in weights]
        self._tables = [weights.tensor(tokens) for _, tokens in named]  # (1, tokens, H) each
        layers = [[weights.linear(f"{embedder}.mlp_{i}") for embedder, _ in named] for i in (0, 2)]
        self._weights = [torch.stack([layer.weight.T for layer in pair]) for pair in layers]  # (E, inputs, outputs)
        biases = [[layer.bias for layer in pair if layer.bias is not None] for pair in layers]
        self._biases = [torch.stack(pair)[:, None] for pair in biases]  # (E, 1, outputs)
        self._mode_tokens = weights.tensor("mode_tokens") if "mode_tokens" in weights else None

    def unfinished(
        self, do: SimpleNamespace, t: Tensor, s: Tensor | None, mode: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None, Tensor | None]:
        """What ``residual`` makes the tokens of, from scalars (R,)."""
        first, second = self._weights
        x = torch.bmm(do.angles([t] if s is None else [t, s], self._frequencies), first)  # (E, R, H)
        x = torch.bmm(do.activated(x, self._biases[0]), second)
        return self._tables, x, self._biases[1], mode, self._mode_tokens


def padded(head: Linear) -> Linear:
    """The token head with as many ids as tensor cores like. An id that is padding has the lowest float32 as bias."""
    missing = -len(head.weight) % VOCABULARY
    assert head.bias is not None
    bias = F.pad(head.bias, (0, missing), value=torch.finfo(torch.float32).min)
    return Linear(F.pad(head.weight, (0, 0, 0, missing)), head.scale, bias)
