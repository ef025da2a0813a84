"""Compiling ONNX graphs with TVM: one kernel per fused operator, weights as inputs, a flat program that calls them.

    ONNX ─fold─▶ nodes ─fuse─▶ groups ─lower─▶ kernels (TIR) ─schedule, compile, cache─▶ objects ─link─▶ library
                                          └──▶ program: buffers, constants, steps
"""
