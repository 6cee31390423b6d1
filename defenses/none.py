"""No defense: the control that every other defense is compared with."""

from dataclasses import dataclass

from fedsec.defense import Defense


@dataclass(frozen=True, kw_only=True)
class Undefended(Defense):
    """Sends the plain gradient, or the plain change of the weights.

    Guarantee: none. Adaptive attack: none needed. Known break: every gradient inversion attack,
    first Zhu et al., "Deep leakage from gradients", NeurIPS 2019.
    """
