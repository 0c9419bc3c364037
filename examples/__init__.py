"""Programs that use the package the way a reader of the README would."""
