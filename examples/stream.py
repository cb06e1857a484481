"""Watch a text form: python stream.py BUNDLE [PROMPT]"""

import sys

import elf_rt

with elf_rt.load(sys.argv[1]) as model:
    for event in model.stream(sys.argv[2:] or None, seed=0, steps=8, drafts_every=2):
        if isinstance(event, elf_rt.Draft):
            print(f"step {event.step} of {event.steps}: {event.texts[0] if event.texts else '...'}")
        else:
            print(event[0].text)
