"""elf-rt in your own Ray Data program: python examples/ray_batch.py BUNDLE INPUT.jsonl OUTPUT_FOLDER [WORKERS]

Each worker holds one model. A row's seed is its own, so that a row has the same text whatever batch it is in."""

import sys

import ray

import elf_rt


class Writer:
    def __init__(self, bundle):
        self.model = elf_rt.load(bundle, threads=1)

    def __call__(self, batch):
        rows = zip(batch["input"], batch["seed"], strict=True)
        texts = [elf_rt.Text(prompt, seed=int(seed)) for prompt, seed in rows]
        return {**batch, "text": [result.text for result in self.model.write(texts)]}


if __name__ == "__main__":
    bundle, source, output, *workers = sys.argv[1:]
    pool = ray.data.ActorPoolStrategy(size=int(workers[0]) if workers else 1)
    rows = ray.data.read_json(source)
    rows.map_batches(Writer, fn_constructor_args=[bundle], compute=pool, num_cpus=1, batch_size=64).write_json(output)
