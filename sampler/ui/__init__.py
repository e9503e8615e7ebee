"""The playground: one page on this machine over the engine and its run folders (`sampler ui`)."""
