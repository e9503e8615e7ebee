"""Folders of pipelines, LoRAs and students, read without torch: plans need them before a load."""
