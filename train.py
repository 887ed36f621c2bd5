"""``python train.py fit|validate|test --config configs/....yaml``."""

if __name__ == "__main__":  # worker processes import this file; they need nothing of it
    from steppo.cli import main

    main()
