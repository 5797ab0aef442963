"""`python -m ngrpo_ops.integrations.openrlhf`. Runs in the launcher."""

from . import main

if __name__ == "__main__":
    main()
