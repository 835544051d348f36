"""Federated person re-identification with models that shrink as they learn, as pure functions in JAX.

Start at `fedklpr_jax.federated`: its docstring is a complete method. `fedklpr_jax.train.run` is the main job.
"""

__version__ = "0.1.0"
