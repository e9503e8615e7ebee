"""The sampling loop and what it needs: noise, schedules, denoisers, batches, CUDA graphs."""
