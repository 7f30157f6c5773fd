"""What `import rsae` costs, what it pulls in, and that SAELens knows "rational" whichever is imported first."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import rsae


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = (
    "print(sorted({'sae_lens', 'transformer_lens', 'transformers', 'datasets', 'pandas', 'plotly'} & set(sys.modules)))"
)


def test_import_pulls_in_nothing_heavy() -> None:
    assert python(f"import sys, rsae; {HEAVY}") == "[]"


def test_modules_pull_in_saelens_only_when_they_use_it() -> None:
    names = ["artefacts", "minimax", "rational", "sparse", "metrics", "hosts", "harvest", "text", "teachers"]
    code = f"import sys; {'; '.join(f'import rsae.{name}' for name in names)}; rsae.fit_gate('relu', (3, 2)); "
    assert (
        python(code + "print([n for n in ('sae_lens', 'transformer_lens', 'transformers') if n in sys.modules])")
        == "[]"
    )


def test_import_takes_less_than_300_ms_beyond_torch() -> None:
    # Processor time, which a busy machine does not stretch as it does the wall's
    code = "import time, torch; start = time.process_time(); import rsae; print(time.process_time() - start)"
    assert float(python(code)) < 0.3


KNOWN = "from sae_lens.registry import get_sae_class; print(*(c.__name__ for c in get_sae_class('rational')))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import rsae; import sae_lens",
        "import sae_lens; import rsae",
        "from rsae.sae import RationalSAE",
        "import rsae; from sae_lens.saes.sae import SAE",
    ],
)
def test_saelens_knows_rational(imports: str) -> None:
    assert python(f"{imports}\n{KNOWN}") == "RationalSAE RationalSAEConfig"


@pytest.mark.parametrize("name", rsae.__all__)
def test_public_names_resolve(name: str) -> None:
    home = f"rsae.{rsae._HOME[name]}"
    value = getattr(rsae, name)
    assert value is getattr(importlib.import_module(home), name)
    assert value.__module__ == home
    assert name in dir(rsae)


def test_star_import_has_what_all_says() -> None:
    assert sorted(rsae.__all__) == sorted(rsae._HOME)
    assert rsae.__all__ == sorted(rsae.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'rsae' has no attribute 'upgrad'"):
        rsae.upgrad  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from rsae import nothing  # noqa: F401
    assert not hasattr(rsae, "_nothing")


def test_version() -> None:
    from importlib.metadata import version

    assert version("rsae") == rsae.__version__
