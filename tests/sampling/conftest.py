"""Every test of sampling runs in both ways: by torch's operators, the specification, and by the kernels."""

from collections.abc import Iterator

import pytest

from penstock.kernels.cpu import library


@pytest.fixture(params=["torch", "kernels"], scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """A whole module with the compiled kernels, and without them."""
    found = library.available(wait_seconds=120) if request.param == "kernels" else None
    if found is None and request.param == "kernels":
        pytest.skip("no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(library._State, "library", found)
        yield request.param
