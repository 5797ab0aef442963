"""Imported before transformers: lets it use a torchvision that was built for another torch.

Such a torchvision has its transforms, which are all that processors of images use, and not its kernels. It registers
what its kernels would return as it is imported, and needs them declared.
"""

import importlib.util

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for _name in ("nms", "qnms"):
            _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
