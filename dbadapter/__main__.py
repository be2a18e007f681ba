"""`python -m dbadapter` is the `dbadapter` command."""

from dbadapter.cli import main

if __name__ == "__main__":
    main()
