"""elf-rt on many machines, by engines that exist: Ray Data, Ray Serve and NVIDIA's Triton server."""
