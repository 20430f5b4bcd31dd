"""Kernels compiled for accelerators that are not here: `libtpu` and CUDA's compilers run on any machine (`mpq[aot]`).

    python -m kernels_pallas.aot tpu --out FILE     estimated cycles of every kernel on four generations of TPUs
    python -m kernels_pallas.aot gpu --out FILE     registers, spills, shared memory and instructions for an H200

`make aot` compiles all of it and compares with what is committed. Every compilation is a process of its own, since a
compiler that meets what it cannot do may end the process. Nothing here says how long a kernel takes: cycles are those
of the chip's units without the memory, and a GPU compiler does not count them.
"""
