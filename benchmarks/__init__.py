"""Benchmarks of the losses against plain PyTorch and the libraries people use today: ``python -m fastloss bench``.

``harness`` measures and knows no loss; a module per family (``contrastive``, ``gaunt``) names its cases and providers;
``report`` writes the results; ``cli`` is the command line.
"""

from . import contrastive, gaunt
from .harness import Suite

SUITES: dict[str, Suite] = {suite.family: suite for suite in (contrastive.SUITE, gaunt.SUITE)}
