"""The parts of `mpq.trace`: layouts, reads of weights, the walk over a jaxpr, the weights found, the evaluation."""
