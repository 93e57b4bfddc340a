"""Attacks on a network, batched: what the rest of the repository uses of them.

Imported by their own names: `minimum_norm.py`, `library.py` (AutoAttack, Square), and `masking.py`
(is the robustness real?).
"""

from .budgets import ATTACKS, Budget, Settings, family, gradient_budget, percent
from .gradient import logits_of, misclassified, pgd
