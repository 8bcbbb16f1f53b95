"""Benchmarks of the losses against plain PyTorch and the libraries people use today: ``python -m fastloss bench``.

``harness`` measures and knows no loss; a module per family (``contrastive``, ``spherical``, ``sliced``, ``gaunt``)
names its cases and providers; ``report`` writes the results; ``cli`` is the command line.
"""

from . import contrastive, gaunt, sliced, spherical
from .harness import Suite

SUITES: dict[str, Suite] = {family.SUITE.family: family.SUITE for family in (contrastive, spherical, sliced, gaunt)}
