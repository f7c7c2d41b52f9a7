"""The tiny models that are sampled from."""

from __future__ import annotations

from tiny_model import class_model, index, model, schema, table, unconditional

__all__ = ["class_model", "index", "model", "schema", "table", "unconditional"]
