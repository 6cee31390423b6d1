import sys

from fedsec.report.console import main

sys.exit(main())
