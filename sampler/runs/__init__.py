"""What a batch of images needs besides a model: prompts in, files out. Nothing imports torch."""
