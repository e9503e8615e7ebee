"""Who computes the batches of a run folder: one process, the ranks of torchrun, Ray's actors."""
