"""A selection as files that training frameworks read."""

from selector.export.files import KINDS, export

__all__ = ["KINDS", "export"]
