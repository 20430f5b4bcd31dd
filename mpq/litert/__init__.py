"""LiteRT files: the jaxpr of a model as a TensorFlow Lite graph, its weights as the runtime's quantized tensors."""
