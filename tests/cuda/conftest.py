"""A room for what can be proved of CUDA code without a GPU: every kernel compiled for one, every step
followed on tensors that have a device and no values. All of it runs anywhere, in well under a minute.
"""
