"""Trainers on the forward process: DiffusionNFT and advantage-weighted matching."""
