"""Triton kernels, installed as ``tso_fast.kernels``.

Only ``__version__`` lives here, and it must stay: ``kernels`` is also the name of a package on PyPI that
transformers looks for. With the repository root on ``sys.path`` this folder answers to that name, and a
missing version makes some transformers releases raise ``InvalidVersion('N/A')``; ``0.0.0`` reads as "too old".
"""

__version__ = "0.0.0"
