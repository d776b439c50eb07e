"""The matmuls of torch: their calls, the layouts of their operands, and attention written out."""
