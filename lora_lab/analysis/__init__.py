"""What did training do to the model?

null       the control: the same training with nothing to learn
spectra    what it wrote into the weights, beside what chance would have written
diagnosis  why does my adapter do nothing?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["diagnosis", "null", "spectra"])
