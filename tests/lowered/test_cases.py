"""Every case of the interpreter's file, on what the kernels were lowered to, between guard pages, at two levels."""

import pytest
from interpreted import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("as_lowered")
