"""What the records say: tables on the console, and one HTML file that stands alone.

python -m fedsec.report FOLDER... [--out PATH]
"""

from fedsec.report.console import main, show
from fedsec.report.page import write
from fedsec.report.pictures import grid

__all__ = ["grid", "main", "show", "write"]
