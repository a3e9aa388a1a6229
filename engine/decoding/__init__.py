"""Decoding strategies, one small file each. `parameters` imports no torch; `registry` holds the strategies."""
