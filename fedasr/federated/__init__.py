"""Federated learning over any model: client, cohort, server, and the round that joins them."""
