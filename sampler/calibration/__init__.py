"""Fits of LinearAG coefficients and momentum numbers to a model."""
