"""Read by every Python that has this folder in its path: workers of data loaders import transformers on their own."""

import sys

if "--multiprocessing-fork" in sys.orig_argv:
    import torchvision_kernels  # noqa: F401
