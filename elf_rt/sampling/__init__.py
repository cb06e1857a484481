"""How a text is drawn: tables of coefficients, noise, the integrator, and the engine that runs them."""
