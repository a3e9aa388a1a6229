"""From an autoregressive checkpoint to a block-diffusion one: generate, adapt, polish, evaluate (`linocut convert`)."""
