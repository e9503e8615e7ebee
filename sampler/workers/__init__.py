"""Computation of a run folder's batches: by one process, ranks of torchrun, or actors of Ray."""
