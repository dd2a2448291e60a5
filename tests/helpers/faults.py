"""Faults planted on purpose, to show that a test finds them."""

import sys

import c2f_jax


def plant(monkeypatch, original, fault):
    """Use ``fault`` wherever the package has imported the function ``original``."""
    package = [
        module for name, module in sys.modules.items() if name.split(".")[0] == c2f_jax.__name__
    ]
    found = [
        (module, name)
        for module in package
        for name, value in vars(module).items()
        if value is original
    ]
    assert found, f"nothing uses {original}"
    for module, name in found:
        monkeypatch.setattr(module, name, fault)
