"""``elf-rt`` and ``python -m elf_rt``: Ctrl-C ends the process without a word until ``cli.main`` takes care of it."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which would show a traceback of the imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from elf_rt.cli import main

if __name__ == "__main__":
    main()
