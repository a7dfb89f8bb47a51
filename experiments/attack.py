"""`fedasr attack`, from a clone: see `fedasr.cli.attack`."""

from fedasr.cli.attack import main

if __name__ == "__main__":
    main()
