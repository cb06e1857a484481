"""Checkpoint to bundle. Imported as ``elf_rt.export``."""

if __name__ != "elf_rt.export":
    raise ImportError("import elf_rt.export, not the folder name")
