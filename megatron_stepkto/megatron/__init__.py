"""Everything that touches Megatron-Core. No other package imports megatron.core."""
