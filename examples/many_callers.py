"""Texts with different parameters side by side, and callers on asyncio: python many_callers.py BUNDLE PROMPT"""

import asyncio
import sys

import elf_rt


async def caller(model: elf_rt.Model, prompt: str, steps: int) -> str:
    """Texts of all callers share network calls. A cancelled task cancels its text."""
    pending = model.submit(elf_rt.Text(prompt, seed=1, params=model.params(steps=steps)), drafts_every=4)
    async for draft in pending:
        print(f"  {steps} steps, step {draft.step}: {draft.texts[0] if draft.texts else ''}")
    return f"{steps} steps: {(await pending).text}"


async def main(model: elf_rt.Model, prompt: str) -> None:
    for line in await asyncio.gather(*(caller(model, prompt, steps) for steps in (4, 8, 16))):
        print(line)


with elf_rt.load(sys.argv[1]) as model:
    asyncio.run(main(model, sys.argv[2]))
    texts = [elf_rt.Text(sys.argv[2], seed=seed, params=model.params(steps=4 + 4 * seed)) for seed in range(3)]
    print(*(result.text for result in model.write(texts)), sep="\n")
    print(f"rows of a call that pay here: {model.stats().max_rows}")
