"""What `import toolkit` offers, and that it is quick."""

import subprocess
import sys

import pytest

import toolkit
from toolkit.errors import UserError


def test_public_names_are_there() -> None:
    for name in toolkit.__all__:
        assert callable(getattr(toolkit, name)), name


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, toolkit; toolkit.Concept, toolkit.EraseTask; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_found_by_name() -> None:
    assert toolkit.load_method("uce").name() == "uce"
    with pytest.raises(UserError, match="did you mean uce"):
        toolkit.load_method("ucee")
