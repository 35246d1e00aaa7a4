"""``python -m diffseg_nnunet``: the same as the command ``diffseg``."""

from diffseg_nnunet.cli import main

if __name__ == "__main__":
    main()
