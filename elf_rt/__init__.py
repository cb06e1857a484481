"""elf-rt: low-latency text from trained ELF models. ``elf_rt.load("model.elfrt").generate(n=4, seed=0)``."""

__version__ = "0.1.0"
