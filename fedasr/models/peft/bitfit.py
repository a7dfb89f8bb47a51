"""BitFit (arXiv 2106.10199): the bias terms alone are trained, those of norms among them.

The paper also trains a new head; that is for `peft.also` to say.
"""

from fedasr.models.peft.kind import Kind

BIASES = r"bias$"

KIND = Kind(trained=lambda config: config.patterns or (BIASES,), reads=("patterns",))
