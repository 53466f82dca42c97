"""Starts ComfyUI's ``main.py``, named first, where torchvision was built for another torch: on the CPU."""

import runpy
import sys

import torch

_MISSING = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # Without its binary part, torchvision fails to import because it cannot describe these operators.
    library = torch.library.Library("torchvision", "DEF")
    for name, signature in _MISSING.items():
        library.define(name + signature)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, sys.argv[0].rpartition("main.py")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
