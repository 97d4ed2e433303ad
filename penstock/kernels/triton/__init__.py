"""Triton's kernels, for CUDA and ROCm devices; on a CPU they run under Triton's interpreter, for tests.

    registry              every kernel with every way in which it can be compiled, as data
    launch                whether Triton is there, how kernels are started, what becomes of those that fail
    operations            the table "triton"
    norms · rotation · gates · attention · sampling · stack      the hosts: they check, choose and start
    *_kernels             what runs on the device; only these import Triton
    schedule              attention's task map, by numpy
    quantized*            products with quantised weights

A host module can be imported where there is no Triton. A kernel module exists in two forms: with
TRITON_INTERPRET=1 in the environment when it is first imported, its kernels are interpreted.
"""
