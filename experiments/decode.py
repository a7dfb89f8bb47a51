"""`fedasr decode`, from a clone: see `fedasr.cli.decode`."""

from fedasr.cli.decode import main

if __name__ == "__main__":
    main()
