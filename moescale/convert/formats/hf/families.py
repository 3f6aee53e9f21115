"""The Hugging Face families that are read and written: a line for each."""

from __future__ import annotations

from moescale.config import Config, ConfigError
from moescale.convert.formats.hf import jamba, llama, mamba, mamba2, mistral, mixtral
from moescale.convert.formats.hf.base import Family

FAMILIES = {family.name: family for family in (
    mixtral.FAMILY, llama.FAMILY, mistral.FAMILY, mamba.FAMILY, mamba2.FAMILY, jamba.FAMILY)}


def titles(names: list[str]) -> str:
    """Join names with commas, and the last one with "and"."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def family_of(config: Config) -> Family:
    """Choose the family that a run is written as. Raises ConfigError where there is none that can express it."""
    candidates = [family for family in FAMILIES.values() if not family.other_layers(config)] or list(FAMILIES.values())
    best = min(candidates, key=lambda family: len(family.misfits(config)))
    misfits = best.misfits(config)
    if misfits:
        names = titles([family.title for family in FAMILIES.values()])
        raise ConfigError(f"{misfits[0]} cannot be expressed by Hugging Face's {best.title}, which of {names} "
                          "is nearest to this run: convert --to moescale")
    return best
