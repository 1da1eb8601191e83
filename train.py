"""The only entry point: python train.py [fit|validate|test|predict] task=NAME key=value ..."""

from tasks.cli import main

if __name__ == "__main__":
    main()
