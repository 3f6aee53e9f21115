import sys

if "--warm" in sys.argv:
    from moescale.warm import run_in_spare

    run_in_spare()

from moescale.cli import main

main()
