"""`python -m posttrain`, which is how launchers of several processes start it."""

from posttrain.cli import app

if __name__ == "__main__":
    app()
