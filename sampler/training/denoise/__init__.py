"""Supervised fine-tuning on images and captions."""
