"""The packages of other engines: a run is refused where one is missing or of another version than was tested."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from moescale.config import ConfigError
from moescale.errors import refuse

OTHERWISE = "or write run.engine=native"


def check_package(engine: str, package: str, oldest: tuple[int, ...], end: tuple[int, ...]) -> None:
    """Refuse a package that is missing or of another version.

    engine: as run.engine names it. oldest: the version that was tested. end: the first that is taken no more. Raises
    ConfigError.
    """
    tested, ends = (".".join(map(str, numbers)) for numbers in (oldest, end))
    install = f"pip install '{package}>={tested},<{ends}'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigError(f"run.engine={engine} needs the package {package}: {install}, {OTHERWISE}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    refuse(not oldest <= numbers < end, f"run.engine={engine} was tested with {package} {tested}, and {found} is "
           f"installed: {install}, {OTHERWISE}")
