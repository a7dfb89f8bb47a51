"""`fedasr prepare`, from a clone: see `fedasr.cli.prepare`."""

from fedasr.cli.prepare import main

if __name__ == "__main__":
    main()
