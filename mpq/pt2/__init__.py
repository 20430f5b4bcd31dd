"""Programs of `torch.export`: the jaxpr of a model as a graph of PyTorch, its weights as packed codes."""
