"""Quantizers with scales: schemes, calibrators of ranges, static and learned scales, gradients."""
