"""The train step that all optimizers share."""
