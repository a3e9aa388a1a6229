"""Masked-diffusion models of a fixed canvas (MDLM, DiDi-Instruct): a lane of its own, without pages or prefixes."""
