"""Inspections of a loaded model: features, attention, denoiser, training images, realism, loss."""
