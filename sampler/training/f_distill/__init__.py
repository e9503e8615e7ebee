"""f-distill: one-step students by f-divergence minimisation."""
