"""Builds the C++ extension and maps the folder ``kernels/`` to ``tso_fast.kernels``; the rest is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tso_fast", "tso_fast.*"]), "tso_fast.kernels"],
    # Explicit, so that an editable install maps both folders one by one and never puts the root on sys.path.
    package_dir={"tso_fast": "tso_fast", "tso_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "tso_fast._C",
            ["csrc/bindings.cpp", "csrc/scoring.cpp"],
            depends=["csrc/scoring.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
