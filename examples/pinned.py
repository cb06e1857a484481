"""Fill the blanks of a template, each of so many tokens: python pinned.py BUNDLE "She paid [2] for the chair." """

import sys

import elf_rt

with elf_rt.load(sys.argv[1]) as model:
    for result in model.generate(pinned=sys.argv[2], n=3, seed=0, steps=8):
        print(result.text)
