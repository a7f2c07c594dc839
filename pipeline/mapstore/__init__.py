"""Word maps on disk: one Zarr v3 group per tar, every chunk checked on every read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.mapstore.read import MapStore as MapStore
    from pipeline.mapstore.schema import ExampleMaps as ExampleMaps

_HOMES = {"MapStore": "read", "ExampleMaps": "schema"}


def __getattr__(name: str):
    # Imported on use, like everything heavier than the standard library.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
