"""Output normalization under the path that packflow gives it.

``from packflow.utils.normalize import ensure_valid_output`` becomes ``from streamproc.utils.normalize import …``;
the code is in ``streamproc.backend.normalize``.
"""

from streamproc.backend.normalize import ensure_native_types, ensure_valid_output

__all__ = ["ensure_native_types", "ensure_valid_output"]
