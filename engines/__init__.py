"""Bundle to TensorRT plans. Imported as ``elf_rt.engines``."""

if __name__ != "elf_rt.engines":
    raise ImportError("import elf_rt.engines, not the folder name")
