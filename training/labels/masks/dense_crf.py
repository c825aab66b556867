"""Whether dense CRFs can be had: an extra that needs a compiler."""

import importlib.util

from model.errors import ConfigError


def require_dense_crf(purpose: str) -> None:
    """Raise ConfigError, with the `purpose` that needs it, if the package is not there."""
    if importlib.util.find_spec("pydensecrf") is None:
        raise ConfigError(f"{purpose} needs pydensecrf2, which a C++ compiler builds: pip install 'useg[crf]'")
