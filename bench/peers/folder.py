"""Write the folder that all peers convert: the bench's shape with random weights, bf16.

.venv/bin/python -m bench.peers.folder FOLDER
"""

import sys

import torch

from qvl.model.config import preset
from qvl.model.qwen3vl import new_model
from qvl.model.weights import save

if __name__ == "__main__":
    save(new_model(preset("0.6B"), dtype=torch.bfloat16), sys.argv[1])
