"""Compiling ONNX graphs with TVM: one kernel per fused operator, weights as inputs, a flat program that calls them.

    ONNX ─read, fold, unroll─▶ nodes ─group─▶ kernels (TensorIR) ─schedule, compile, cache─▶ objects
                                                 └──▶ program: buffers, constants, steps

`lower.lower` makes the program, `cache.KernelCache.objects` its object files. Nothing here touches a device.
"""
