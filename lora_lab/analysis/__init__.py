"""What did training do to the model?

spectra     what it wrote into the weights, beside what chance, or a training with nothing to learn, would have written
divergence  how far it moved the model from its base, and what holds it near
diagnosis   why does my adapter do nothing?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["diagnosis", "divergence", "spectra"])
