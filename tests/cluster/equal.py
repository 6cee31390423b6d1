"""Whether two sweeps' folders hold the same cells and the same rows, times aside."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

from fedsec import cells


def numbers(sweep: Path) -> dict[str, list[dict]]:
    return {cell.folder.name: tiny.numbers(cell.folder) for cell in cells.find(sweep)}


one, other = map(numbers, map(Path, sys.argv[1:]))
if not one or one != other:
    sys.exit(f"they differ: {[name for name in one | other if one.get(name) != other.get(name)]}")
rows = sum(map(len, one.values()))
print(f"equal: {len(one)} cells, {rows} rows")
