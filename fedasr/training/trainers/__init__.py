"""The kinds of training, see `fedasr.training.trainer`: federated rounds, steps on pooled data."""
