from megatron_stepkto.cli.main import main

if __name__ == "__main__":
    main()
