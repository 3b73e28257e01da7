"""The Megatron-Core training loop. It knows no loss formula and no file format of other stages."""
