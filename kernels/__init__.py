"""Triton kernels, installed as ``tso_fast.kernels``.

``__version__`` must stay: transformers looks for a PyPI package that is also called ``kernels``. With the repository
root on ``sys.path`` it finds this folder instead, and without a version some releases of transformers raise
``InvalidVersion('N/A')``; ``0.0.0`` reads as "too old".
"""

__version__ = "0.0.0"
