from fedsec import process

process.enter()

from fedsec.report.console import main  # noqa: E402

process.leave(main())
