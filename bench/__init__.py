"""Speed beside a peer and beside the machine's limit, in one run; rows go to results.jsonl."""

import sys
from pathlib import Path

import torch

ORACLE = Path(__file__).parents[1] / ".oracle"
if not (ORACLE / "torchvision").is_dir():
    raise SystemExit(
        "transformers' processors need torchvision, which lies apart from the environment; run: make .oracle/torchvision"
    )
# Its wheel loads beside a CPU torch only once two operators are declared, and transformers looks for it when first imported.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.append(str(ORACLE))
