"""The runs that train's tests have, and the same checks of shapes and types."""

from tests.train.conftest import finished, make_settings, store, store_root

__all__ = ["finished", "make_settings", "store", "store_root"]
