"""`python -m worker_orcd`: the command line."""

from worker_orcd.cli.main import main

if __name__ == "__main__":
    main()
