"""ZeRO 1 to 3: sharded optimizer state, gradients and weights (Rajbhandari et al. 2020)."""
