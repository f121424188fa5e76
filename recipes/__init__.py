"""Complete, commented recipes in YAML; `bcosify align --recipe NAME` reads them by name, such as `bcos/vit`."""
