"""Flax models, as their users write them: objectives from modules and losses, and the building
blocks that outer levels are made of.

Imported on first use of ``bilevax.nn``, and Flax with it.
"""

import sys

from bilevax._core.showing import tidy
from bilevax.nn import bert
from bilevax.nn.adapters import GateParam, LoRALinear, Prompt, add_lora
from bilevax.nn.choice import ArchParam, SoftChoice, mask, soft_choice, straight_through
from bilevax.nn.constraints import constrained
from bilevax.nn.from_linen import from_linen
from bilevax.nn.from_nnx import from_nnx
from bilevax.nn.net import Net, paths
from bilevax.nn.objectives import Bilevel, bilevel, objective
from bilevax.nn.optimizers import going_on, hand_back
from bilevax.nn.weighting import LabelNet, WeightNet


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "ArchParam",
    "Bilevel",
    "GateParam",
    "LabelNet",
    "LoRALinear",
    "Net",
    "Prompt",
    "SoftChoice",
    "WeightNet",
    "add_lora",
    "bert",
    "bilevel",
    "constrained",
    "from_linen",
    "from_nnx",
    "going_on",
    "hand_back",
    "mask",
    "objective",
    "paths",
    "soft_choice",
    "straight_through",
]

tidy(sys.modules[__name__])
