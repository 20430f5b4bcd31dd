"""ONNX files: the jaxpr of a model as a graph, its weights as ONNX Runtime's block-quantized operands."""
