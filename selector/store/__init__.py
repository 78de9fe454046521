"""The feature store on disk: format, writer and reader."""

from selector.store.reader import FeatureStore
from selector.store.writer import StoreWriter

__all__ = ["FeatureStore", "StoreWriter"]
