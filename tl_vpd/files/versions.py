"""The versions of the libraries that a result depends on, for its record."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    """Installed versions by package."""
    installed = {}
    for package in ("tl-vpd", "torch", "transformer-lens", "transformers", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
