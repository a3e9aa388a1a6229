"""Device functions, each with a torch reference and a Triton kernel behind one name.

Import the modules (`linocut.kernels.attention`, ...) for what they hold. This file stays empty on purpose: from the
repository's root, transformers' probe for a package named `kernels` imports it, and must find nothing that can fail.
"""
