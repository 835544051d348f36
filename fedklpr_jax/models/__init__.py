"""Networks behind one seam: `spec.init` and `spec.apply` over plain dicts (see `spec.py`)."""

from fedklpr_jax.models.convolution import choose_convolution, convolution_for, patches_convolution
from fedklpr_jax.models.spec import SPECS, ModelSpec, make_spec

__all__ = ["SPECS", "ModelSpec", "choose_convolution", "convolution_for", "make_spec", "patches_convolution"]
