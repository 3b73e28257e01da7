"""Everything that uses Megatron-Core. No other package imports megatron.core."""
