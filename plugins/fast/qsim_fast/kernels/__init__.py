"""The kernels: C++ for CPUs, Triton for GPUs, and how they are compiled and called."""
