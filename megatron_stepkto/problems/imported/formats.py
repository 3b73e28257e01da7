"""The public step-label formats by name.

Each parser converts one raw row to its solutions. Labels keep what the source judged; nothing more is inferred:
1 right, 0 wrong, null not judged. A parser's ValueError becomes an error with file and
line in ``records.read_rows``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.problems.imported.people import parse_bigbench_mistake, parse_mrben, parse_processbench
from megatron_stepkto.problems.imported.prm800k import parse_prm800k
from megatron_stepkto.problems.imported.rollouts import parse_gsm8k_solutions, parse_math_shepherd, parse_omegaprm
from megatron_stepkto.problems.imported.solution import ImportedRow
from megatron_stepkto.problems.imported.trl import parse_trl_dpo, parse_trl_kto, parse_trl_stepwise

Importer = Callable[[dict[str, Any]], ImportedRow]

FORMATS: dict[str, Importer] = {
    "bigbench_mistake": parse_bigbench_mistake,
    "gsm8k_solutions": parse_gsm8k_solutions,
    "math_shepherd": parse_math_shepherd,
    "mrben": parse_mrben,
    "omegaprm": parse_omegaprm,
    "prm800k": parse_prm800k,
    "processbench": parse_processbench,
    "trl_dpo": parse_trl_dpo,
    "trl_kto": parse_trl_kto,
    "trl_stepwise": parse_trl_stepwise,
}
_ALSO_CALLED = {"math_aps": "omegaprm"}


def importer_of(name: str) -> Importer:
    """The parser of a format; ``-`` and ``_`` and upper and lower case are the same in a name.

    Raises:
        UserError: unknown format; names the nearest one and all known ones.
    """
    plain = name.lower().replace("-", "_")
    plain = _ALSO_CALLED.get(plain, plain)
    if plain not in FORMATS:
        near = difflib.get_close_matches(plain, [*FORMATS, *_ALSO_CALLED], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown import format {name!r}; {hint}known formats: {', '.join(FORMATS)}")
    return FORMATS[plain]
