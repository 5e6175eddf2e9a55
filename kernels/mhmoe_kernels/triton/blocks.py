from typing import NamedTuple
import torch
class Blocks(NamedTuple):
    rows: int
    hidden: int
    warps: int
    stages: int
def blocks_for(kind, which, width, dtype):
    return Blocks(32, 32, 4, 2) if dtype == torch.float32 else Blocks(64, 32, 4, 2)
