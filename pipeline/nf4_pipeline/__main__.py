"""python -m nf4_pipeline: the same as the command `nf4`."""

from nf4_pipeline.cli import main

if __name__ == "__main__":
    main()
