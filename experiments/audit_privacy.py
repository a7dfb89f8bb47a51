"""`fedasr audit`, from a clone: see `fedasr.cli.audit`."""

from fedasr.cli.audit import main

if __name__ == "__main__":
    main()
