"""A model shared by a plain thread pool: each thread asks for one text, and all of them share network calls.

python examples/threads.py model.elfrt < prompts.txt
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import elf_rt


def main() -> None:
    prompts = [line.strip() for line in sys.stdin if line.strip()]
    with elf_rt.load(sys.argv[1]) as model, ThreadPoolExecutor(16) as pool:

        def write(prompt: str) -> str | None:
            return model.submit(elf_rt.Text(prompt, seed=0, params=model.params(steps=8))).result().text

        for text in pool.map(write, prompts):
            print(text)


if __name__ == "__main__":
    main()
