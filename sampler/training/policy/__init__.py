"""Policy gradients: DDPO and RLCM."""
