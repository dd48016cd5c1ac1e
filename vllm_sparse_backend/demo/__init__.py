"""The demo: a real model and a long real document, served dense and then sparse, side by side."""
