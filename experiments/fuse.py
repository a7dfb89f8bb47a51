"""`fedasr fuse`, from a clone: see `fedasr.cli.fuse`."""

from fedasr.cli.fuse import main

if __name__ == "__main__":
    main()
