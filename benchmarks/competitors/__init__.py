"""One script a library: the same federated rounds in each, timed. `benchmarks/many_clients.py` calls them."""
