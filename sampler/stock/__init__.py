"""Drop-ins for stock diffusers pipelines: scheduler, guidance hook, guider."""
