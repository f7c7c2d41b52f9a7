"""The table of which plans are made."""

from __future__ import annotations

from tiny_model import index, schema, table

__all__ = ["index", "schema", "table"]
