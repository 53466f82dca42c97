"""What quantised weights cost on a GPU: the parts of `benchmarks.quantised_on_gpu`."""
