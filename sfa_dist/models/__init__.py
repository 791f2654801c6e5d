"""Plain `nn.Module`s: nothing here knows about ranks, engines or the environment."""
