"""The conformance kit: the laws of a sub-module, of a router and of a model, checked on yours.

    from sma.testing import check_submodule

    def test_my_submodule():
        check_submodule(MySpec(size=3))

Every law is tried on many small random examples, and the error lists all that are broken, each with an example.
Needs hypothesis: `pip install hypothesis`.
"""

from sma.testing.check import ConformanceError as ConformanceError
from sma.testing.check import check_model as check_model
from sma.testing.check import check_router as check_router
from sma.testing.check import check_submodule as check_submodule

__all__ = ["ConformanceError", "check_model", "check_router", "check_submodule"]
