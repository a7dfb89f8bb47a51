"""Model fusion: models compete for data, attract partners and merge (M2N2); baselines."""

# What `fedasr.fusion.tasks.make_method` makes: M2N2, its ablations, and other searches.
METHODS = (
    *("m2n2", "no_split", "no_attraction", "no_crossover", "ga"),
    *("map_elites", "cma_es", "mixing_ratio", "average", "task_arithmetic"),
)
