"""Values that somebody may give to options, sensible ones among them."""

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "1e3",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "99999999999999999999",
    "999999999999",
    "4000000000",
    "x",
    "0x1",
    "١",
    "1_0",
    "1,2",
]
NUMBERS += ["", " "]
TEXTS = ["", " ", "\t", "a la", "x" * 20_000, "a [2] b", "é🙂", "日本語", "\u202e", "\ufeff", "a\nb"]
TEXTS += ["[2]", "[0]", "[99999999999]", "[", "]", "<pad>", "</s>", "-", "--"]
PATHS = [
    "-",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    "/proc/self/mem",
    "missing",
    "no/where",
    "b.elfrt",
    "~",
    "$HOME",
    "in.jsonl",
]
PATHS += ["", "x" * 300, "b.elfrt/manifest.json"]
SAMPLING = [
    "--guidance-scale",
    "--sc-cfg",
    "--gamma",
    "--temperature",
    "--gamma-power",
    "--grid-mean",
    "--grid-std",
    "--x-prev-scale",
]
SAMPLING += ["--guidance-from", "--guidance-until", "--steps"]
SHAPES = [*NUMBERS, "1:2", "1:2:3", "3:2:1"]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "generate": {
        **dict.fromkeys(["-n", "--seed", "--length", "--threads", *SAMPLING], NUMBERS),
        **dict.fromkeys(["--prompt", "--template"], TEXTS),
        **dict.fromkeys(["--input", "--output"], PATHS),
        "--sampler": ["ode", "sde", "ab2", "euler", ""],
        "--schedule": ["uniform", "quantile", "logit_normal", "cosine"],
        "--preset": ["default", "fast", ""],
        "--backend": ["auto", "openvino", "onnxruntime", "tensorrt", "torch", "jax"],
        "--precision": ["auto", "fp32", "bf16", "fp16", "int8", "fp4"],
    },
    "bench": {
        **dict.fromkeys(["--steps", "--batch", "--repeats", "--length", "--seed", "--threads"], NUMBERS),
        **dict.fromkeys(["--input", "--plot", "--checkpoint"], PATHS),
        "--backends": ["onnxruntime", "onnxruntime:fp32", "onnxruntime:fp4", "jax", "", ",", ":", "openvino:int8"],
        "--vs": ["torch-eager", "jax", "", ","],
        "--random": ["tiny", "ELF-X"],
    },
    "eval": {
        **dict.fromkeys(["-n", "--seed", "--seeds", "--steps", "--threads"], NUMBERS),
        **dict.fromkeys(["--input", "--references", "--against", "--lm", "--tokenizer"], PATHS),
        "--metric": ["fluency", "accuracy", "agreement", "self-bleu", "bleu"],
    },
    "verify": {"--replay": PATHS, "--threads": NUMBERS, "--backend": ["auto", "tensorrt", "onnxruntime"]},
    "build-engine": {
        **dict.fromkeys(["--batch", "--length", "--opt-level", "--sm"], SHAPES),
        "--timing-cache": PATHS,
        "--target": ["auto", "tensorrt", "tensorrt-rtx", "x"],
        "--precision": ["fp16", "fp32", "bf16", "auto"],
    },
    "info": {},
    "export": {
        **dict.fromkeys(["--config", "--tokenizer", "--encoder", "--prompts", "--presets"], PATHS),
        "--precision": ["fp32", "fp4", "", ",", "fp32,fp32"],
        "--opset": ["20", "23", "24", "x"],
    },
}  # fmt: skip
SHORT = {"generate": ["--steps", "1"], "bench": ["--steps", "1", "--repeats", "1"], "eval": ["--steps", "1"]}
