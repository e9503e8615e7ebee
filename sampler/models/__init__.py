"""Loading of models: folders, single files, options, LoRA adapters, students."""
