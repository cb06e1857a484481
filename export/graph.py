"""The network as two ONNX graphs, `denoiser` and `discretizer`, over one weights file.

Letters: R rows, L text length, P prefix tokens, S = P + L, C latent width, H hidden, D head width (padded by the plan).
Sources: facts of the operators at https://onnx.ai/onnx/operators; the network is elf_rt.export.reference.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elf_rt.export import rewrite
from elf_rt.export.graph_builder import GraphBuilder, Value, WeightFile
from elf_rt.export.precision import FP32, Precision, PrecisionPlan
from elf_rt.export.reference import NORM_EPS
from elf_rt.params import ModelConfig

FUSED_OPSET = 23  # the first with Attention and RMSNormalization
END = np.iinfo(np.int64).max
LOGITS_AT_ONCE = 65536  # logits of one token that are in memory together


def variant_files(prefix: str = "") -> dict[str, str]:
    """A variant of a bundle's manifest: what ``write_graphs`` writes, in the folder `prefix` ("fp16/")."""
    names = {"denoiser": "denoiser.onnx", "discretizer": "discretizer.onnx", "weights": "weights.bin"}
    return {part: prefix + name for part, name in names.items()}


def write_graphs(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, np.ndarray],
    plan: PrecisionPlan = FP32,
    opset: int = FUSED_OPSET,
) -> None:
    """Write denoiser.onnx, discretizer.onnx and weights.bin into `folder`.

    `state` holds float32 arrays under the official names. `opset` 23 and above uses Attention and RMSNormalization;
    20 spells both out, for engines that are older than these operators. Inputs and outputs are float32 in every plan.
    """
    metadata = {"precision": plan.precision.value}
    with WeightFile(folder / "weights.bin") as weights:
        for name, write in (("denoiser", _denoiser), ("discretizer", _discretizer)):
            # TensorRT-RTX has no float32 GEMM for Turing (SM 7.5), where FP16 is what one wants; it does convolve.
            graph = GraphBuilder(name, opset, weights, avoid_float32_gemm=plan.precision is Precision.FP16)
            write(graph, config, state, plan)
            graph.save(folder / f"{name}.onnx", metadata)


def _denoiser(g: GraphBuilder, config: ModelConfig, state: Mapping[str, np.ndarray], plan: PrecisionPlan) -> None:
    _Denoiser(g, config, state, plan).write()


class _Denoiser:
    """(z, x_prev, t, s, mode) -> (x, hidden); inputs that the model has no parameters for are left out."""

    def __init__(
        self, g: GraphBuilder, config: ModelConfig, state: Mapping[str, np.ndarray], plan: PrecisionPlan
    ) -> None:
        self.config, self.state, self.plan, self.g = config, state, plan, g
        self.width = plan.padded(config.head_dim, rewrite.HEAD)

    def write(self) -> None:
        config, g = self.config, self.g
        latents: tuple[int | str, ...] = ("rows", "length", config.latent_dim)
        text = g.input("z", latents)
        if config.self_cond:
            text = g.op("Concat", text, g.input("x_prev", latents), axis=-1)  # (R, L, 2C)
        prefix = self.prefix()  # (R, P, H)
        g.scope = "text_proj"
        text = self.layer("text_proj.proj1", text, rewrite.input_projection(config, self.state))
        text = self.layer("text_proj.proj2", text, rewrite.text_projection(self.state, self.plan))  # (R, L, H)
        h = g.op("Concat", prefix, text, axis=1)  # (R, S, H)
        rotary = self.rotary(h)
        for block in range(config.depth):
            h = g.op("Add", h, self.attention(block, h, rotary))
            h = g.op("Add", h, self.mlp(block, h))
        g.scope = "final_layer"
        hidden = g.op("Slice", h, g.integers(config.num_prefix_tokens), g.integers(END), g.integers(1))  # (R, L, H)
        normed = self.norm("final_layer.norm_final", hidden)
        x = self.layer("final_layer.linear", normed, self.stored("final_layer.linear"))  # (R, L, C)
        g.output(x, "x", latents)
        g.output(hidden, "hidden", ("rows", "length", config.hidden_size))

    def prefix(self) -> Value:
        config, g = self.config, self.g
        frequencies = g.weight("frequencies", rewrite.scalar_frequencies())
        tokens = [self.scalar_tokens("t", "t_embedder", "t_emb_tokens", frequencies)]
        if config.num_self_cond_cfg_tokens:
            tokens.append(self.scalar_tokens("s", "self_cond_cfg_embedder", "self_cond_cfg_tokens", frequencies))
        if config.num_model_mode_tokens:
            g.scope = "mode_tokens"
            mode = g.op("Unsqueeze", g.input("mode", ("rows",)), g.integers(1, 2))  # (R, 1, 1)
            tokens.append(g.op("Mul", mode, g.weight("mode_tokens", self.state["mode_tokens"])))
        return g.op("Concat", *tokens, axis=1)

    def scalar_tokens(self, scalar: str, embedder: str, tokens: str, frequencies: Value) -> Value:
        """(R,) -> (R, tokens, H): the learned tokens plus the embedding of the scalar."""
        g = self.g
        g.scope = embedder
        angles = g.op("Mul", g.op("Unsqueeze", g.input(scalar, ("rows",)), g.integers(1)), frequencies)  # (R, 128)
        features = g.op("Concat", g.op("Cos", angles), g.op("Sin", angles), axis=-1)  # (R, 256)
        inner = silu(g, scalar_linear(g, f"{embedder}.mlp_0", features, self.stored(f"{embedder}.mlp_0")))
        embedding = scalar_linear(g, f"{embedder}.mlp_2", inner, self.stored(f"{embedder}.mlp_2"))  # (R, H)
        return g.op("Add", g.op("Unsqueeze", embedding, g.integers(1)), g.weight(tokens, self.state[tokens]))

    def rotary(self, h: Value) -> tuple[Value, Value]:
        """cos and sin of this call's positions, each (S, D). Constant once the length is."""
        g = self.g
        g.scope = "rotary"
        cos, sin = rewrite.rotary_tables(self.config, self.plan)
        length = g.integer_op("Shape", h, start=1, end=2)
        start, axis = g.integers(0), g.integers(0)
        return (
            g.op("Slice", g.weight("rotary.cos", cos), start, length, axis),
            g.op("Slice", g.weight("rotary.sin", sin), start, length, axis),
        )

    def attention(self, block: int, h: Value, rotary: tuple[Value, Value]) -> Value:
        """(R, S, H) residual -> (R, S, H) float32, to be added to it."""
        g, plan, heads, width = self.g, self.plan, self.config.num_heads, self.width
        name = f"blocks.{block}.attn"
        weights = rewrite.attention_weights(self.config, self.state, block, plan)
        normed = self.norm(f"blocks.{block}.norm1", h)
        g.scope = name
        q, k, v = self.heads(name, normed, weights)  # each (R, heads, S, D)
        precision = plan.precision_of(name)
        q = g.cast(self.rotate(self.head_norm(f"{name}.q_norm", q, weights.q_norm), rotary), precision)
        k = g.cast(self.rotate(self.head_norm(f"{name}.k_norm", k, weights.k_norm), rotary), precision)
        mixed = self.mix(q, k, g.cast(v, precision))  # (R, heads, S, D)
        mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])  # (R, S, heads, D)
        mixed = g.op("Reshape", mixed, g.integers(0, 0, heads * width))  # (R, S, heads * D)
        return self.layer(f"{name}.proj", mixed, weights.proj)

    def heads(self, name: str, x: Value, weights: rewrite.AttentionWeights) -> tuple[Value, Value, Value]:
        """x (R, S, H) -> q and k in float32, v in the type of the product; each (R, heads, S, D)."""
        g, precision = self.g, self.plan.precision_of(f"{name}.qkv")
        qkv = matmul(g, f"{name}.qkv", x, weights.qkv, precision)
        if precision is Precision.FP32:  # engines fuse a single addition with the product
            qkv = g.op("Add", qkv, g.weight(f"{name}.qkv.bias", weights.bias.reshape(-1)))
        qkv = g.op("Reshape", qkv, g.integers(0, 0, 3 * self.config.num_heads, self.width))  # (R, S, 3 heads, D)
        qkv = g.op("Transpose", qkv, perm=[0, 2, 1, 3])  # (R, 3 heads, S, D)
        q, k, v = g.ops("Split", 3, qkv, axis=1, num_outputs=3)
        if precision is Precision.FP32:
            return q, k, v
        q = g.op("Add", g.cast(q, Precision.FP32), g.weight(f"{name}.q.bias", weights.bias[0]))
        k = g.op("Add", g.cast(k, Precision.FP32), g.weight(f"{name}.k.bias", weights.bias[1]))
        return q, k, v

    def mix(self, q: Value, k: Value, v: Value) -> Value:
        """softmax(q k^T / sqrt(true head width)) v, no mask."""
        g, scale = self.g, self.config.head_dim**-0.5
        if g.opset >= FUSED_OPSET:
            return g.op("Attention", q, k, v, scale=scale)
        assert q.precision is not None
        q = g.op("Mul", q, g.scalar(scale, q.precision))  # scaled before the product: the form that engines fuse
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))  # (R, heads, S, S)
        return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)

    def rotate(self, x: Value, rotary: tuple[Value, Value]) -> Value:
        """Half-split rotary of x (R, heads, S, D), written the way engines recognise."""
        g, (cos, sin), half = self.g, rotary, self.width // 2
        axis = g.integers(3)
        first = g.op("Slice", x, g.integers(0), g.integers(half), axis)
        second = g.op("Slice", x, g.integers(half), g.integers(2 * half), axis)
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))

    def mlp(self, block: int, h: Value) -> Value:
        """(R, S, H) residual -> (R, S, H) float32, to be added to it."""
        g, plan, name = self.g, self.plan, f"blocks.{block}.mlp"
        weights = rewrite.mlp_weights(self.config, self.state, block, plan)
        normed = self.norm(f"blocks.{block}.norm2", h)
        g.scope = name
        ab = self.layer(f"{name}.w12", normed, weights.w12)
        a, b = g.ops("Split", 2, ab, axis=-1, num_outputs=2)  # each (R, S, inner)
        return self.layer(f"{name}.w3", g.op("Mul", silu(g, a), b), weights.w3)

    def layer(self, name: str, x: Value, weights: rewrite.Linear) -> Value:
        """A linear layer whose product runs in the plan's type. What it returns is float32."""
        return linear(self.g, name, x, weights, self.plan.precision_of(name))

    def norm(self, name: str, x: Value) -> Value:
        """RMSNorm of the float32 residual."""
        self.g.scope = name
        return rms_norm(self.g, x, self.g.weight(f"{name}.weight", self.state[f"{name}.weight"]), NORM_EPS)

    def head_norm(self, name: str, x: Value, norm: rewrite.HeadNorm) -> Value:
        """RMSNorm of float32 queries or keys (R, heads, S, D) over each head."""
        return rms_norm(self.g, x, self.g.weight(f"{name}.weight", norm.weight), norm.eps)

    def stored(self, name: str) -> rewrite.Linear:
        return rewrite.Linear(self.state[f"{name}.weight"].T, self.state[f"{name}.bias"])


def _discretizer(g: GraphBuilder, config: ModelConfig, state: Mapping[str, np.ndarray], plan: PrecisionPlan) -> None:
    """hidden (R, L, H) -> ids (R, L): argmax of the token logits, the lowest id on ties."""
    hidden = g.input("hidden", ("rows", "length", config.hidden_size))
    if config.decoder_head_norm:
        weight = g.weight("decoder_head_norm.weight", state["decoder_head_norm.weight"])
        hidden = rms_norm(g, hidden, weight, NORM_EPS)
    features = linear(g, "proj", hidden, rewrite.head_projection(state), plan.precision_of("proj"))  # (R, L, C)
    features = g.op("Gelu", features, approximate=config.head_gelu)
    g.output(_likeliest(g, features, rewrite.unembedding(config, state, plan), plan), "ids", ("rows", "length"))


def _likeliest(g: GraphBuilder, features: Value, weights: rewrite.Linear, plan: PrecisionPlan) -> Value:
    """features (R, L, C) -> the ids (R, L) of the largest logits.

    A large vocabulary goes by parts, `unembed.0` and so on: the best of each, then the best of these. So the logits of
    a text of 1024 tokens never take more than 0.3 GB, where T5Gemma's 262144 ids would take 1 GB.
    """
    precision, vocab = plan.precision_of("unembed"), weights.weight.shape[1]
    if vocab <= LOGITS_AT_ONCE:
        return _argmax(g, linear(g, "unembed", features, weights, precision))
    assert weights.bias is not None
    best, ids = [], []
    for part, first in enumerate(range(0, vocab, LOGITS_AT_ONCE)):
        ends = slice(first, first + LOGITS_AT_ONCE)
        some = rewrite.Linear(weights.weight[:, ends], weights.bias[ends])
        logits = linear(g, f"unembed.{part}", features, some, precision)  # (R, L, LOGITS_AT_ONCE)
        best.append(g.op("ReduceMax", logits, g.integers(-1), keepdims=1))
        ids.append(g.integer_op("Add", _argmax(g, logits, keepdims=1), g.integers(first)))  # (R, L, 1)
    winner = _argmax(g, g.op("Concat", *best, axis=-1), keepdims=1)
    chosen = g.integer_op("GatherElements", g.integer_op("Concat", *ids, axis=-1), winner, axis=-1)
    return g.integer_op("Squeeze", chosen, g.integers(-1))


def _argmax(g: GraphBuilder, x: Value, keepdims: int = 0) -> Value:
    """The lowest index of the largest value on the last axis."""
    return g.integer_op("ArgMax", x, axis=-1, keepdims=keepdims, select_last_index=0)


def linear(
    g: GraphBuilder, name: str, x: Value, weights: rewrite.Linear, precision: Precision = Precision.FP32
) -> Value:
    """x (R, S, inputs) @ weight in `precision`; then, in float32, times the scale and plus the bias."""
    out = g.cast(matmul(g, name, x, weights.weight, precision), Precision.FP32)
    if weights.scale is not None:
        out = g.op("Mul", out, g.weight(f"{name}.scale", weights.scale))
    if weights.bias is not None:
        out = g.op("Add", out, g.weight(f"{name}.bias", weights.bias))
    return out


def matmul(g: GraphBuilder, name: str, x: Value, weight: np.ndarray, precision: Precision) -> Value:
    """x (R, S, inputs) @ weight (inputs, outputs), in and out in `precision`."""
    x = g.cast(x, precision)
    if precision is not Precision.FP32 or not g.avoid_float32_gemm:
        return g.op("MatMul", x, g.weight(f"{name}.weight", weight, precision))
    x = g.op("Transpose", x, perm=[0, 2, 1])  # (R, inputs, S)
    x = g.op("Conv", x, g.weight(f"{name}.weight", weight.T[..., None]))  # (R, outputs, S)
    return g.op("Transpose", x, perm=[0, 2, 1])


def scalar_linear(g: GraphBuilder, name: str, x: Value, weights: rewrite.Linear) -> Value:
    """x (R, inputs) @ weight + bias in float32. One row per text: small enough to be written as products and a sum."""
    if not g.avoid_float32_gemm:
        return linear(g, name, x, weights)
    assert weights.bias is not None
    weight = g.weight(f"{name}.weight", weights.weight.T)  # (outputs, inputs)
    products = g.op("Mul", g.op("Unsqueeze", x, g.integers(1)), weight)  # (R, outputs, inputs)
    return g.op("Add", g.op("ReduceSum", products, g.integers(-1), keepdims=0), g.weight(f"{name}.bias", weights.bias))


def silu(g: GraphBuilder, x: Value) -> Value:
    return g.op("Mul", x, g.op("Sigmoid", x))


def rms_norm(g: GraphBuilder, x: Value, weight: Value, eps: float) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, all float32."""
    if g.opset >= FUSED_OPSET:
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.integers(-1), keepdims=1)
    return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.scalar(eps)))), weight)


def positions(g: GraphBuilder, ids: Value) -> Value:
    """(S,) 0, 1, ... of ids (B, S)."""
    length = g.integer_op("Shape", ids, start=1, end=2)
    zero, one, length = (g.integer_op("Squeeze", v) for v in (g.integers(0), g.integers(1), length))
    return g.integer_op("Range", zero, length, one)


def normalised(g: GraphBuilder, latents: Value, position: Value, statistics: np.ndarray | None) -> Value:
    """(latents - mean) / deviation of each channel of latents (B, S, C), at positions (S,).

    statistics: (2, P, C) means and deviations at positions 0 .. P - 1, the last for all that follow; None: as they are.
    """
    if statistics is None:
        return latents
    g.scope = "latent_stats"
    row = g.integer_op("Min", position, g.integers(statistics.shape[1] - 1))
    mean, std = (
        g.op("Gather", g.weight(f"latent_stats.{name}", table), row, axis=0)  # (S, C)
        for name, table in zip(("mean", "std"), statistics, strict=True)
    )
    return g.op("Div", g.op("Sub", latents, mean), std)
