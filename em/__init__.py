"""Emergent and subliminal misalignment as data-mediated transfer, in plain PyTorch.

One noun per file; imports point one way. The README's tree says what is where.
"""
