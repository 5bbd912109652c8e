"""The ablations by name."""

from qvl.recipes.ablate.ablation import Ablation
from qvl.recipes.ablate.deepstack import DEEPSTACK
from qvl.recipes.ablate.loss import LOSS
from qvl.recipes.ablate.mrope import MROPE
from qvl.recipes.ablate.timestamps import TIMESTAMPS
from qvl.recipes.ablate.v0 import V0

ABLATIONS: dict[str, Ablation] = {a.name: a for a in (MROPE, TIMESTAMPS, DEEPSTACK, LOSS, V0)}
