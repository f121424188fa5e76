"""The template of model cards, and the cards of models that were converted, aligned and measured."""
