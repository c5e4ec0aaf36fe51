"""`python -m zeroadam` is `zeroadam`."""

from zeroadam.cli import main

if __name__ == "__main__":
    main()
