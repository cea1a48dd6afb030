"""ONNX graphs: look into one, quantize one, write the ones we ship.

onnx is imported by these modules alone, and only inside functions, because a device that opens releases never needs it.
"""
