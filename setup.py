"""Builds the C++ extension and maps the folder ``kernels/`` to ``tso_fast.kernels``; the rest is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tso_fast", "tso_fast.*"]), "tso_fast.kernels"],
    # Explicit, so that an editable install maps both folders one by one and never puts the root on sys.path.
    package_dir={"tso_fast": "tso_fast", "tso_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "tso_fast._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.inl")])),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
