from moescale.cli import main

main()
