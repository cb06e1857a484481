"""``python -m elf_rt``: the same as ``elf-rt``."""

from elf_rt.cli import main

main()
