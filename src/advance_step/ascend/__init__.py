"""Ascend's `torch_npu` and our operators: patching the real one, emulating the device.

Nothing here is imported unasked.
"""
