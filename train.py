"""``python train.py fit|validate|test --config configs/....yaml``."""

if __name__ == "__main__":  # worker processes import this file; they need nothing of it
    import gc

    gc.disable()  # what is imported stays; to look for garbage among it takes a second
    from steppo.cli import main

    gc.enable()
    main()
