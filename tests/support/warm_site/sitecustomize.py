"""Imported by each Python that starts with this folder on its path; see `tests.support.warm`."""

import os
import sys

if os.environ.get("NF4_TESTS_WARM"):
    import warm_proxy  # type: ignore[import-not-found]

    warm_proxy.stand_in_for(sys.orig_argv)
