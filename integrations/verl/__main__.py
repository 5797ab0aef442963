"""`python -m ngrpo_ops.integrations.verl`. Runs in the launcher."""

from .launcher import main

if __name__ == "__main__":
    main()
