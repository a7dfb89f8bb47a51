"""Model fusion: models compete for data, attract partners and merge (M2N2); baselines."""
