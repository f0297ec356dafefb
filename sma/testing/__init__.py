"""The conformance kit: the laws of sub-modules, routers and models, and functions that check yours.

    from sma.testing import check_submodule

    def test_my_submodule():
        check_submodule(MySpec(size=3))

Every law is checked on many small random examples; the error lists all broken laws, each with an example.
The kit needs hypothesis: `pip install hypothesis`.
"""

from sma.testing.check import ConformanceError as ConformanceError
from sma.testing.check import check_model as check_model
from sma.testing.check import check_router as check_router
from sma.testing.check import check_submodule as check_submodule

__all__ = ["ConformanceError", "check_model", "check_router", "check_submodule"]
