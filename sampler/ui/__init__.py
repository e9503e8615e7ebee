"""The playground: a local web page over the engine and run folders (`sampler ui`)."""
