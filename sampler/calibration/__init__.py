"""Fits of LinearAG coefficients, momentum numbers and grids to a model; measured samplers."""
