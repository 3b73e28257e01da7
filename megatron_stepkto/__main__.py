from megatron_stepkto.cli import main

if __name__ == "__main__":
    main()
