"""The wheel that draws charts and vector pictures, without a browser."""

from .registries import Package

VL_CONVERT = Package(
    "PyPI",
    "vl-convert-python",
    "BSD-3-Clause",
    "1.9.0.post1",
    (
        "3c1558fa0055e88c465bd3d71760cde9fa2c94a95f776a0ef9178252fd820b1f",  # x86_64
        "e6ecfe4b7e2ea9e8c30fd6d6eaea3ef85475be1ad249407d9796dce4ecdb5b32",  # aarch64
    ),
)
