"""`fedasr sweep`, from a clone: see `fedasr.cli.sweep`."""

from fedasr.cli.sweep import main

if __name__ == "__main__":
    main()
