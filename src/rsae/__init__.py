"""Upgrade a pretrained sparse autoencoder to a Rational Sparse Autoencoder, with an equal-compute control beside it.

    >>> import rsae
    >>> fit = rsae.fit_gate("relu", (3, 2))
    >>> round(fit.max_error, 6)
    0.021845

Importing this package is cheap: SAELens and transformers are loaded when a stage needs them. SAELens knows the architecture
"rational" as soon as both packages are imported, in either order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from rsae.harvest import ActivationStore
    from rsae.hosts import Host, load_host
    from rsae.minimax import NumericalWarning, RationalFit, fit_gate
    from rsae.pipeline import upgrade
    from rsae.rational import RationalGate, Surrogate
    from rsae.sae import RationalSAE, RationalSAEConfig
    from rsae.teachers import Teacher, load_teacher

__version__ = "0.1.0"

__all__ = [
    "ActivationStore",
    "Host",
    "NumericalWarning",
    "RationalFit",
    "RationalGate",
    "RationalSAE",
    "RationalSAEConfig",
    "Surrogate",
    "Teacher",
    "fit_gate",
    "load_host",
    "load_teacher",
    "upgrade",
]

_HOME = {
    "ActivationStore": "harvest",
    "Host": "hosts",
    "NumericalWarning": "minimax",
    "RationalFit": "minimax",
    "RationalGate": "rational",
    "RationalSAE": "sae",
    "RationalSAEConfig": "sae",
    "Surrogate": "rational",
    "Teacher": "teachers",
    "fit_gate": "minimax",
    "load_host": "hosts",
    "load_teacher": "teachers",
    "upgrade": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Public names, each loaded with its module when first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'rsae' has no attribute {name!r}")
    value = getattr(import_module(f"rsae.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


@when_imported("sae_lens")
def _register(_: Any) -> None:
    """SAELens has no entry points: rsae.sae registers itself with it, which costs its import only where it is paid already."""
    import_module("rsae.sae")
